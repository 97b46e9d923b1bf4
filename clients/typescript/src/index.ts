// Client for Saccade and other OpenAI-compatible vision-language servers.
//
// import { Client } from "saccade-client";
// const client = new Client({ baseURL: "http://127.0.0.1:8000/v1" });
// console.log((await client.ask("What is in the picture?", "photo.jpg")).text);

export { Answer } from "./answers.js";
export type { Completion, Grounded, ImageCost, Region, ShownImage, Usage } from "./answers.js";
export { drawBoxes, findBoxes, findPoints, pointToOriginal, toOriginal } from "./boxes.js";
export type { Box, Point } from "./boxes.js";
export { Client, Conversation, DEFAULT_URL } from "./client.js";
export type { AskOptions, ClientOptions } from "./client.js";
export { SaccadeError, UnexpectedAnswer, UnusableMedia } from "./errors.js";
export { Pdf, pdf, Picture, picture, Video, video } from "./media.js";
export type { Detail, MediaSource, Medium, PictureOptions, Source } from "./media.js";
export type { ContentItem, Message } from "./prepare.js";
export { AnswerStream } from "./stream.js";

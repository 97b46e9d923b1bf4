// Takes one picture with the camera. Browsers allow it on localhost and with TLS only.
import { h } from "./dom.js";

/** A JPEG of the camera's picture; null if the person closes the dialog. */
export async function capture() {
  const note = h("p", { class: "note" }, "Waiting for the camera …");
  const video = h("video", {
    autoplay: true,
    playsinline: true,
    muted: true,
    "aria-label": "Camera",
  });
  const take = h(
    "button",
    { type: "submit", class: "primary", value: "take", disabled: true },
    "Take the picture",
  );
  const dialog = h(
    "dialog",
    { class: "camera", "aria-label": "Take a picture" },
    h(
      "form",
      { method: "dialog" },
      video,
      note,
      h(
        "p",
        { class: "row end" },
        h("button", { type: "button", class: "quiet", onclick: () => dialog.close("") }, "Cancel"),
        take,
      ),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  const closed = new Promise((resolve) =>
    dialog.addEventListener("close", resolve, { once: true }),
  );
  let stream = null;
  try {
    if (!navigator.mediaDevices) throw new Error("insecure");
    stream = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 1920 } },
    });
    video.srcObject = stream;
    video.addEventListener("loadeddata", () => (take.disabled = false), { once: true });
    note.remove();
  } catch (error) {
    note.textContent =
      error.message === "insecure"
        ? "Browsers allow the camera only on localhost and over https."
        : "The browser gives no camera: none is here, or it was not allowed.";
  }
  await closed;
  let photo = null;
  if (dialog.returnValue === "take" && video.videoWidth) {
    const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    photo = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  }
  stream?.getTracks().forEach((track) => track.stop());
  dialog.remove();
  return photo;
}

// Start: pages by the hash of the URL, the model, the key, light and dark.
import { getJson, key } from "./api.js";
import { ask } from "./ask.js";
import { h, icon } from "./dom.js";

const PAGES = {
  ask: async () => ask,
  explain: async () => (await import("./explain.js")).explain,
  live: async () => (await import("./live.js")).live,
};
const THEME = "saccade.theme";
const model = document.getElementById("model");
const dialog = document.getElementById("key-dialog");
const context = { model: () => model.value, models: [] };
let shown = null;

const pageName = () => (location.hash.slice(1) in PAGES ? location.hash.slice(1) : "ask");

async function show() {
  const name = pageName();
  const page = await PAGES[name]();
  if (name !== pageName()) return; // that of the last click is shown
  shown?.hide?.();
  shown = page;
  for (const each of Object.keys(PAGES)) {
    document.getElementById(`page-${each}`).hidden = each !== name;
    const link = document.querySelector(`nav a[href="#${each}"]`);
    if (each === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  page.show(document.getElementById(`page-${name}`), context);
}

async function listModels() {
  try {
    const { data } = await getJson("v1/models");
    context.models = data;
    model.replaceChildren(...data.map(({ id }) => h("option", { value: id }, id)));
    document.body.classList.remove("no-model");
  } catch (error) {
    document.body.classList.add("no-model");
    if (error.status !== 401) model.replaceChildren(h("option", { value: "" }, "no model"));
  }
}

function askForKey() {
  if (dialog.open) return;
  document.getElementById("key-input").value = key.get();
  dialog.showModal();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  window.dispatchEvent(new Event("theme"));
}

document.getElementById("key").append(icon("key"));
document.getElementById("theme").append(icon("theme"));
document.getElementById("key").addEventListener("click", askForKey);
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(isDark ? "light" : "dark");
});
dialog.addEventListener("close", () => {
  if (dialog.returnValue !== "ok") return;
  key.set(document.getElementById("key-input").value.trim());
  listModels();
  window.dispatchEvent(new Event("key-set"));
});
document.getElementById("key-cancel").addEventListener("click", () => dialog.close(""));
// Escape must not use the key that is typed.
dialog.addEventListener("cancel", () => (dialog.returnValue = ""));
window.addEventListener("needs-key", askForKey);
window.addEventListener("hashchange", show);
if (localStorage.getItem(THEME))
  document.documentElement.dataset.theme = localStorage.getItem(THEME);
show();
listModels();

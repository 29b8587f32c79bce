import { generate, listModels, withDataUris } from "./api.js";
import { showCode } from "./code.js";
import { find } from "./dom.js";
import { clearErrors, readRequest, showError, showModel } from "./form.js";
import { acceptPastes } from "./pictures.js";
import { showEnd, showProgress, showResult, showStart } from "./results.js";

const KEY = "imprompt.api-key";

let models = [];
let running = null;

async function showModels() {
  clearErrors();
  try {
    models = await listModels(find("#api-key").value);
  } catch (error) {
    return showError(error);
  }
  find("#model").replaceChildren(...models.map(({ id }) => new Option(id)));
  if (models.length) showModel(models[0].capabilities);
  else showError({ param: "model", message: "The server has no models." });
}

async function send() {
  if (running) return;
  running = new AbortController();
  showRunning(true);
  clearErrors();
  try {
    const request = await readRequest({ draw: true });
    showStart();
    const pictures = await generate(
      { ...(await withDataUris(request)), stream: true, preview: true },
      { key: find("#api-key").value, signal: running.signal, onProgress: showProgress },
    );
    showResult(request, pictures);
    showEnd(pictures.length === 1 ? "Done: one picture." : `Done: ${pictures.length} pictures.`);
  } catch (error) {
    showEnd(error.name === "AbortError" ? "Canceled." : "Failed.");
    if (error.name !== "AbortError") showError(error);
  } finally {
    running = null;
    showRunning(false);
  }
}

function showRunning(isRunning) {
  find("#generate").setAttribute("aria-disabled", isRunning);
  const cancel = find("#cancel");
  if (!isRunning && document.activeElement === cancel) find("#generate").focus();
  cancel.hidden = !isRunning;
}

find("#request").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
find("#request").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
});
find("#cancel").addEventListener("click", () => running?.abort());
find("#model").addEventListener("change", ({ target }) => {
  showModel(models[target.selectedIndex].capabilities);
});
for (const button of document.querySelectorAll("[data-code]")) {
  button.addEventListener("click", async () => {
    clearErrors();
    try {
      const request = await readRequest();
      await showCode(button.dataset.code, request, { hasKey: find("#api-key").value !== "" });
    } catch (error) {
      showError(error);
    }
  });
}
find("#api-key").value = sessionStorage.getItem(KEY) ?? "";
find("#access form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("#api-key").value);
  find("#access").open = false;
  showModels();
});

acceptPastes();
showModels();

import { toFile } from "./api.js";
import { find, fromTemplate, make } from "./dom.js";
import { reuseSeed, startFrom } from "./form.js";

let announcedQuarters = 0;

/** Show a progress bar, before the first step is done. */
export function showStart() {
  find("#progress").hidden = false;
  find("#empty").hidden = true;
  find("#progress progress").removeAttribute("value");
  find("#progress .facts").textContent = "Waiting for the first step";
  find("#progress img").hidden = true;
  find("#progress").scrollIntoView({ block: "nearest" });
  announcedQuarters = 0;
  announce("Generating.");
}

/** Show an event of the stream: how many steps are done, or a preview. */
export function showProgress({ step, steps, b64_json: preview, output_format: format }) {
  if (steps) {
    Object.assign(find("#progress progress"), { max: steps, value: step });
    find("#progress .facts").textContent = `Step ${step} of ${steps}`;
    const quarters = Math.floor((4 * step) / steps);
    if (quarters > announcedQuarters && step < steps) announce(`${25 * quarters} %`);
    announcedQuarters = quarters;
  }
  if (preview) {
    const image = find("#progress img");
    image.src = `data:image/${format};base64,${preview}`;
    image.hidden = false;
  }
}

/** Remove the progress bar, and say how the request ended. */
export function showEnd(message) {
  find("#progress").hidden = true;
  find("#empty").hidden = find("#runs").childElementCount > 0;
  announce(message);
}

function announce(message) {
  find("#announcement").textContent = message;
}

/** Add the pictures of a request above the earlier ones. */
export function showResult(request, pictures) {
  const run = fromTemplate("run-template");
  const [{ size, timings, warnings }] = pictures;
  const steps = request.num_inference_steps;
  const facts = [size.replace("x", " × "), steps && `${steps} steps`, seconds(timings.total)];
  find("h2", run).textContent = request.prompt || "No prompt";
  find("summary", run).textContent = facts.filter(Boolean).join(" · ");
  for (const [stage, value] of Object.entries(timings)) {
    const name = stage.replaceAll("_", " ");
    find("dl", run).append(make("dt", { textContent: name }), make("dd", { textContent: seconds(value) }));
  }
  find(".warnings", run).append(...warnings.map((text) => make("li", { textContent: text })));
  find(".gallery", run).append(...pictures.map((picture, index) => figure(request, picture, index)));
  find("#runs").prepend(run);
}

function seconds(value) {
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

function figure({ prompt, num_frames: frames }, { b64_json: data, seeds, output_format: format }, index) {
  const element = fromTemplate("result-template");
  const seed = seeds[index];
  const file = toFile(data, `imprompt-${seed}.${format}`, `image/${format}`);
  const picture = { src: URL.createObjectURL(file), alt: prompt || "Picture without a prompt" };
  Object.assign(find("img", element), picture);
  find(".frame", element).addEventListener("click", () => {
    Object.assign(find("#viewer img"), picture);
    find("#viewer").showModal();
  });
  find("figcaption .facts", element).textContent = `Seed ${seed}`;
  find(".reuse", element).addEventListener("click", () => reuseSeed(seed));
  find(".start", element).hidden = Boolean(frames); // clips start from videos
  find(".start", element).addEventListener("click", () => startFrom(file));
  Object.assign(find(".download", element), { href: picture.src, download: file.name });
  return element;
}

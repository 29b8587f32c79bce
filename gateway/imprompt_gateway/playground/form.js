import { ApiError } from "./api.js";
import { find, fromTemplate, make, showValue } from "./dom.js";
import { MaskEditor } from "./mask.js";
import { Pictures } from "./pictures.js";

const PIXEL_STEP = 8; // sizes are multiples of this, the scale factor of the VAE
const MAX_SEED = 2 ** 32;

const start = new Pictures(find("#start .pictures"), { label: find("#start .pictures").dataset.label });
const control = new Pictures(find("#control .pictures"), { label: find("#control .pictures").dataset.label });
const mask = new MaskEditor(find("#mask"));
let capabilities;

/** Fit the form to what a model can do: its size becomes the model's, other values stay if the model takes them. */
export function showModel(described) {
  capabilities = described;
  const { ip_adapters: adapters = [], loras = [], controlnets = [], defaults = {}, limits = {} } = described;
  find("#model-summary").textContent = [described.family, described.backend, described.precision]
    .filter(Boolean)
    .join(" · ");
  showAdapters(adapters.filter((adapter) => adapter.takes_images));

  find("#loras").hidden = !loras.length;
  find("#loras div").replaceChildren(...loras.map(loraFields));

  find("#control").hidden = !controlnets.length;
  showOptions(find("#controlnet"), controlnets.map((name) => [name, name]));
  const schedulers = (described.schedulers ?? []).map((name) => [name, name.replace(/Scheduler$/, "")]);
  const own = defaults.scheduler ? ` (${defaults.scheduler.replace(/Scheduler$/, "")})` : "";
  showOptions(find("#scheduler"), [["", `Default${own}`], ...schedulers]);

  for (const side of ["width", "height"]) {
    const input = find(`#${side}`);
    [input.min, input.max] = limits[side] ?? ["", ""];
    input.value = defaults[side] ?? "";
  }
  find("#frames-field").hidden = !limits.frames;
  if (limits.frames) {
    [find("#frames").min, find("#frames").max] = limits.frames;
    find("#frames-hint").textContent = `Empty for a picture, ${limits.frames.join(" to ")} for a clip.`;
  }
  fitSize();
}

function showAdapters(adapters) {
  const container = find("#adapters");
  const shown = new Map([...container.children].map((element) => [element.dataset.name, element]));
  container.replaceChildren(...adapters.map((adapter) => shown.get(adapter.name) ?? adapterFields(adapter)));
  find("#image-prompts").hidden = !adapters.length;
}

function adapterFields({ name, kind }) {
  const element = fromTemplate("adapter-template");
  element.dataset.name = name;
  find("legend", element).append(name);
  if (kind !== name) find("legend", element).append(" ", make("small", { textContent: kind }));
  new Pictures(find(".pictures", element), { label: `Add pictures to ${name}`, multiple: true });
  const [label, range, output] = find(".slider", element).children;
  range.id = label.htmlFor = `scale-${name}`;
  output.htmlFor = range.id;
  label.append(make("span", { className: "unseen", textContent: ` of ${name}` }));
  showValue(range, output);
  return element;
}

function loraFields(name) {
  const element = fromTemplate("lora-template");
  const [label, range, output] = element.children;
  label.textContent = range.name = name;
  range.id = label.htmlFor = `lora-${name}`;
  showValue(range, output);
  return element;
}

function showOptions(select, options) {
  const { value } = select;
  select.replaceChildren(...options.map(([name, text]) => new Option(text, name)));
  if (options.some(([name]) => name === value)) select.value = value;
}

/** Set width and height to the aspect ratio of the start picture, and about as many pixels as the model prefers. */
async function fitSize() {
  const [file] = start.files;
  const image = file && (await createImageBitmap(file).catch(() => null));
  if (!image) return;
  const { defaults, limits } = capabilities;
  const scale = Math.sqrt((defaults.width * defaults.height) / (image.width * image.height));
  for (const side of ["width", "height"]) {
    const [low, high] = limits[side];
    const fitted = Math.round((image[side] * scale) / PIXEL_STEP) * PIXEL_STEP;
    find(`#${side}`).value = Math.min(high, Math.max(low, fitted));
  }
}

find("#start .pictures").addEventListener("change", async () => {
  const [file] = start.files;
  find("#start-options").hidden = !file;
  find("#start .state").textContent = file ? file.name : "";
  await fitSize();
  find("#mask").hidden = !(await mask.setPicture(file));
});
find("#control .pictures").addEventListener("change", () => {
  find("#control .state").textContent = control.files[0]?.name ?? "";
});
showValue(find("#strength"), find("output[for=strength]"));
showValue(find("#control-scale"), find("output[for=control-scale]"));

/** Start the next request from a picture. */
export function startFrom(file) {
  find("#start").open = true;
  start.add([file]);
  find("#start summary").focus();
}

/** Set the seed of the next request. */
export function reuseSeed(seed) {
  find("#seed").value = seed;
  find("#count").value = 1;
}

/**
 * Return the request in the form, named and nested as the API takes it, with files as pictures.
 *
 * With `draw`, random seeds are drawn here, one per picture, so that each picture can be repeated.
 */
export async function readRequest({ draw = false } = {}) {
  const request = { model: find("#model").value, prompt: find("#prompt").value };
  const text = (name, value) => {
    if (value.trim()) request[name] = value;
  };
  const number = (name, input) => {
    if (input.validity.badInput) throw new ApiError("must be a number", { param: name });
    if (input.value !== "") request[name] = input.valueAsNumber;
  };
  text("negative_prompt", find("#negative-prompt").value);
  Object.assign(request, readAdapters(), readLoras());
  if (start.files.length) {
    [request.image] = start.files;
    number("strength", find("#strength"));
    const painted = find("#mask").hidden ? null : await mask.file();
    if (painted) request.mask_image = painted;
  }
  if (control.files.length && !find("#control").hidden) {
    [request.control_image] = control.files;
    text("controlnet", find("#controlnet").value);
    number("controlnet_conditioning_scale", find("#control-scale"));
  }
  for (const id of ["width", "height", "steps", "guidance"]) number(find(`#${id}`).name, find(`#${id}`));
  text("scheduler", find("#scheduler").value);
  if (!find("#frames-field").hidden) number("num_frames", find("#frames"));
  if ("num_frames" in request) request.output_format = "webp"; // smaller than a GIF, with all colors
  number("num_images_per_prompt", find("#count"));
  number("seed", find("#seed"));
  const count = request.num_images_per_prompt ?? 1;
  if (count === 1) delete request.num_images_per_prompt;
  if (request.seed === undefined && draw) {
    request.seed = Array.from({ length: count }, () => Math.floor(Math.random() * MAX_SEED));
  } else if (request.seed !== undefined && count > 1) {
    request.seed = Array.from({ length: count }, (_, index) => request.seed + index);
  }
  return request;
}

function readAdapters() {
  const images = {};
  const scales = {};
  for (const element of find("#adapters").children) {
    const { files } = find(".pictures", element).pictures;
    if (!files.length) continue;
    images[element.dataset.name] = files;
    scales[element.dataset.name] = find("input[type=range]", element).valueAsNumber;
  }
  return Object.keys(images).length ? { ip_adapter_image: images, ip_adapter_scale: scales } : {};
}

function readLoras() {
  const ranges = [...document.querySelectorAll("#loras input")].filter(({ valueAsNumber: scale }) => scale);
  const lora = Object.fromEntries(ranges.map(({ name, valueAsNumber: scale }) => [name, scale]));
  return ranges.length ? { lora } : {};
}

/** Show an error at the field of its parameter, or else above the buttons. */
export function showError({ param, message }) {
  const field = param && find(`[data-param~="${CSS.escape(param)}"]`);
  if (!field || field.closest("[hidden]")) {
    find("#general-error").textContent = message;
    find("#general-error").hidden = false;
    return;
  }
  for (let details = field.closest("details"); details; details = details.parentElement.closest("details")) {
    details.open = true;
  }
  const control = find("input:not([hidden]), select, textarea", field);
  const prefix = `${param}: `;
  const shown = message.startsWith(prefix) ? message.slice(prefix.length) : message;
  field.append(make("p", { id: `${control.id || param}-error`, className: "error", textContent: shown }));
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", field.lastElementChild.id);
  control.focus({ preventScroll: true });
  field.scrollIntoView({ block: "center" });
}

/** Remove the errors of the last request. */
export function clearErrors() {
  find("#general-error").hidden = true;
  for (const error of document.querySelectorAll("[data-param] > .error")) error.remove();
  for (const control of document.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  }
}

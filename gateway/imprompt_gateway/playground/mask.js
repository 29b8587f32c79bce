import { complain, find, showValue } from "./dom.js";

const MAX_SIDE = 1024; // of the canvas; the server scales the mask to the size of the result anyway

/** A mask that the user paints over a picture, or uploads. */
export class MaskEditor {
  #canvas;
  #context;
  #brush;
  #root;
  #last = null;

  constructor(root) {
    this.#root = root;
    this.#canvas = find("canvas", root);
    this.#context = this.#canvas.getContext("2d", { willReadFrequently: true });
    this.#brush = find(".brush", root);
    showValue(find("#brush-size", root), find("output", root));
    find(".clear", root).addEventListener("click", () => this.#clear());
    find(".upload", root).addEventListener("change", (event) => this.#upload(event.target));

    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.#stroke(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.#showBrush(event);
      if (this.#last) for (const point of event.getCoalescedEvents?.() ?? [event]) this.#stroke(point);
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, () => {
        this.#last = null;
        this.#describe();
      });
    }
    canvas.addEventListener("pointerleave", () => (this.#brush.hidden = true));
  }

  /** Start an empty mask over `file`. Returns whether the browser can show that picture. */
  async setPicture(file) {
    const image = find("img", this.#root);
    URL.revokeObjectURL(image.src);
    image.removeAttribute("src");
    this.#clear();
    if (!file) return false;
    image.src = URL.createObjectURL(file);
    try {
      await image.decode();
    } catch {
      return false;
    }
    const scale = Math.min(1, MAX_SIDE / Math.max(image.naturalWidth, image.naturalHeight));
    this.#canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
    this.#canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
    return true;
  }

  /** Return the mask as a PNG file, white where it is painted, or null if nothing is. */
  async file() {
    const pixels = this.#pixels();
    if (!pixels.data.some((value, index) => index % 4 === 3 && value > 127)) return null;
    for (let index = 0; index < pixels.data.length; index += 4) {
      pixels.data.fill(pixels.data[index + 3] > 127 ? 255 : 0, index, index + 3);
      pixels.data[index + 3] = 255;
    }
    const { width, height } = this.#canvas;
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return new File([await canvas.convertToBlob({ type: "image/png" })], "mask.png", { type: "image/png" });
  }

  #pixels() {
    return this.#context.getImageData(0, 0, this.#canvas.width, this.#canvas.height);
  }

  /** Diameter of the brush in pixels of the canvas. */
  get #size() {
    return (find("#brush-size", this.#root).value / 100) * Math.min(this.#canvas.width, this.#canvas.height);
  }

  #stroke(event) {
    const box = this.#canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.#canvas.width;
    const y = ((event.clientY - box.top) / box.height) * this.#canvas.height;
    const from = this.#last ?? { x: x - 0.01, y }; // canvases draw no line of length zero
    const context = this.#context;
    const erases = find("input[name=brush]:checked", this.#root).value === "erase";
    context.globalCompositeOperation = erases ? "destination-out" : "source-over";
    context.strokeStyle = getComputedStyle(this.#canvas).color;
    context.lineCap = "round";
    context.lineWidth = this.#size;
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(x, y);
    context.stroke();
    this.#last = { x, y };
  }

  #showBrush(event) {
    const box = this.#canvas.getBoundingClientRect();
    const size = this.#size * (box.width / this.#canvas.width);
    Object.assign(this.#brush.style, {
      width: `${size}px`,
      height: `${size}px`,
      left: `${event.clientX - box.left}px`,
      top: `${event.clientY - box.top}px`,
    });
    this.#brush.hidden = event.pointerType === "touch";
  }

  #clear() {
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    this.#describe();
  }

  /** Replace the mask by a picture that is white where to repaint. */
  async #upload(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    const { width, height } = this.#canvas;
    const image = await createImageBitmap(file).catch(() => null);
    complain(input, image ? "" : `${file.name} is not a picture that this browser can read`);
    if (!image) return;
    this.#context.globalCompositeOperation = "source-over";
    this.#context.drawImage(image, 0, 0, width, height);
    const pixels = this.#pixels();
    const [red, green, blue] = getComputedStyle(this.#canvas).color.match(/\d+/g).map(Number);
    for (let index = 0; index < pixels.data.length; index += 4) {
      const light = pixels.data[index] + pixels.data[index + 1] + pixels.data[index + 2] > 382;
      pixels.data.set(light ? [red, green, blue, 255] : [0, 0, 0, 0], index);
    }
    this.#context.putImageData(pixels, 0, 0);
    this.#describe();
  }

  #describe() {
    const pixels = this.#pixels().data;
    let painted = 0;
    for (let index = 3; index < pixels.length; index += 4) painted += pixels[index] > 127;
    const percent = Math.round((400 * painted) / pixels.length);
    this.#canvas.setAttribute("aria-label", painted ? `Mask: ${percent} % painted` : "Mask: empty");
  }
}

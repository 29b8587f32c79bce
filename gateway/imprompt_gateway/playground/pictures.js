import { complain, find, make } from "./dom.js";

/**
 * Pictures that the user drops, pastes, or chooses, with a thumbnail each.
 *
 * Fills `element` and fires `change` on it. Without `multiple`, a new picture replaces the old one.
 */
export class Pictures {
  #element;
  #multiple;
  #files = [];

  constructor(element, { label, multiple = false }) {
    this.#element = element;
    this.#multiple = multiple;
    element.append(find("#pictures-template").content.cloneNode(true));
    find(".text", element).textContent = label;

    const input = find("input", element);
    input.multiple = multiple;
    input.addEventListener("change", (event) => {
      event.stopPropagation(); // the list fires its own
      this.add(input.files);
      input.value = ""; // so that choosing the same file again is a change
    });
    element.pictures = this; // for pastes, which arrive at the document
    element.addEventListener("dragover", (event) => {
      event.preventDefault();
      element.classList.add("over");
    });
    element.addEventListener("dragleave", (event) => {
      if (!element.contains(event.relatedTarget)) element.classList.remove("over");
    });
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      element.classList.remove("over");
      this.add(event.dataTransfer.files);
    });
  }

  get files() {
    return this.#files;
  }

  /** Add the pictures among `files`. Returns whether there are any. */
  add(files) {
    const pictures = [...files].filter((file) => file.type.startsWith("image/"));
    const [other] = files;
    complain(find("input", this.#element), other && !pictures.length ? `${other.name} is not a picture` : "");
    if (!pictures.length) return false;
    this.#files = this.#multiple ? [...this.#files, ...pictures] : pictures.slice(0, 1);
    this.#show();
    return true;
  }

  #show() {
    const list = find("ul", this.#element);
    for (const image of list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    list.replaceChildren(...this.#files.map((file) => this.#thumbnail(file)));
    this.#element.classList.toggle("filled", this.#files.length > 0);
    this.#element.dispatchEvent(new Event("change", { bubbles: true }));
  }

  #thumbnail(file) {
    const remove = make("button", { type: "button", title: "Remove", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.addEventListener("click", () => {
      this.#files = this.#files.filter((other) => other !== file);
      this.#show();
      find("input", this.#element).focus();
    });
    const image = make("img", { src: URL.createObjectURL(file), alt: file.name, title: file.name });
    return make("li", {}, image, remove);
  }
}

/**
 * Let users paste pictures anywhere: into the list that has the focus, or else into the first one on the page.
 *
 * Files dropped next to a list do nothing, where the browser would leave the page to show them.
 */
export function acceptPastes() {
  document.addEventListener("paste", (event) => {
    const focused = document.activeElement.closest("fieldset:has(.pictures)");
    const target = find(".pictures", focused ?? document);
    if (target.pictures.add(event.clipboardData.files)) event.preventDefault();
  });
  for (const kind of ["dragover", "drop"]) {
    document.addEventListener(kind, (event) => {
      if (event.dataTransfer.types.includes("Files")) event.preventDefault();
    });
  }
}

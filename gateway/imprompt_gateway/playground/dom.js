/** Return the first element in `root` that matches `selector`. */
export function find(selector, root = document) {
  return root.querySelector(selector);
}

/** Return the content of a `<template>`: its first element, as a copy. */
export function fromTemplate(id) {
  return find(`#${id}`).content.firstElementChild.cloneNode(true);
}

/** Create an element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Show the value of a range input in its `<output>`, now and when it changes. */
export function showValue(range, output) {
  const show = () => {
    output.value = range.value + (output.dataset.unit ?? "");
  };
  range.addEventListener("input", show);
  show();
}

/** Say at a control that its value is wrong, until the next change. */
export function complain(input, message) {
  input.setCustomValidity(message);
  input.reportValidity();
}

import { find, make } from "./dom.js";

const GRPC_PORT = 8001;

/** Name every file in a request, so that no two share a name. */
function nameFiles(value, names = new Map()) {
  if (value instanceof File) {
    const [, stem, suffix] = /^(.*?)(\.[^.]*)?$/.exec(value.name);
    let name = value.name;
    for (let number = 2; [...names.values()].includes(name); number += 1) name = `${stem}-${number}${suffix ?? ""}`;
    if (!names.has(value)) names.set(value, name);
  } else if (value !== null && typeof value === "object") {
    for (const entry of Object.values(value)) nameFiles(entry, names);
  }
  return names;
}

/** Write a value as JSON or as Python; they only differ in strings and files. */
function literal(value, style, indent = "") {
  if (value instanceof File) return style.file(value);
  if (typeof value === "string") return style.string(value);
  if (Array.isArray(value)) return `[${value.map((entry) => literal(entry, style, indent)).join(", ")}]`;
  if (typeof value !== "object") return String(value);
  const entries = Object.entries(value).map(([name, entry]) => `${style.string(name)}: ${literal(entry, style)}`);
  return `{${entries.join(", ")}}`;
}

function curl(request, names, { hasKey, clip }) {
  // In an unquoted here-document, these three are special.
  const escape = (text) => text.replace(/[\\$`]/g, "\\$&");
  const style = {
    string: (text) => escape(JSON.stringify(text)),
    file: (file) => `"$(base64 < '${names.get(file).replaceAll("'", "'\\''")}' | tr -d '\\n')"`,
  };
  const fields = Object.entries(request).map(([name, value]) => `  "${name}": ${literal(value, style)}`);
  const [type, output] = clip ? ["image/webp", "out.webp"] : ["image/png", "out.png"];
  return [
    `curl --fail-with-body ${new URL("v1/images/generations", document.baseURI)} \\`,
    ...(hasKey ? ['  -H "Authorization: Bearer $IMPROMPT_API_KEY" \\'] : []),
    `  -H "Content-Type: application/json" -H "Accept: ${type}" \\`,
    `  --data-binary @- -o ${output} <<JSON`,
    "{",
    fields.join(",\n"),
    "}",
    "JSON",
    "",
  ].join("\n");
}

function python(request, names, { clip }) {
  const style = {
    string: (text) => JSON.stringify(text),
    file: (file) => JSON.stringify(names.get(file)),
  };
  const fields = Object.entries(request).map(([name, value]) => `        ${name}=${literal(value, style)},`);
  return [
    "from imprompt import Client",
    "",
    `with Client("${location.hostname}:${GRPC_PORT}") as client:  # the gRPC address of the server`,
    "    result = client.generate(",
    ...fields,
    "    )",
    `result.save("out.${clip ? "webp" : "png"}")`,
    "",
  ].join("\n");
}

const LANGUAGES = { curl: { title: "curl", write: curl }, python: { title: "Python", write: python } };

/** Copy a request as code, and show the code with the files that it reads. */
export async function showCode(language, request, context) {
  const { title, write } = LANGUAGES[language];
  const names = nameFiles(request);
  const dialog = find("#code");
  const text = find("textarea", dialog);
  find("h2", dialog).textContent = title;
  text.value = write(request, names, context);
  text.rows = Math.min(24, text.value.split("\n").length);
  find(".files", dialog).hidden = !names.size;
  find(".files ul", dialog).replaceChildren(
    ...[...names].map(([file, name]) =>
      make("li", {}, make("a", { href: URL.createObjectURL(file), download: name, textContent: name })),
    ),
  );
  dialog.showModal();
  await copy();
}

/** Copy the shown code. Outside HTTPS and localhost, browsers have no clipboard, and users copy the selection. */
async function copy() {
  const dialog = find("#code");
  const text = find("textarea", dialog);
  try {
    await navigator.clipboard.writeText(text.value);
    find("[role=status]", dialog).textContent = "Copied.";
  } catch {
    text.select();
    find("[role=status]", dialog).textContent = "Press Ctrl+C to copy.";
  }
}

find("#code .copy").addEventListener("click", copy);
find("#code").addEventListener("close", () => {
  for (const link of document.querySelectorAll("#code .files a")) URL.revokeObjectURL(link.href);
});

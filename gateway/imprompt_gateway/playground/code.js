import { find, make } from "./dom.js";

const GRPC_PORT = 8001;

/** Give every file in a request a name of its own. */
function nameFiles(request) {
  const names = new Map();
  for (const file of filesIn(request)) {
    const [, stem, suffix = ""] = /^(.*?)(\.[^.]*)?$/.exec(file.name);
    const taken = [...names.values()];
    let name = file.name;
    for (let number = 2; taken.includes(name); number += 1) name = `${stem}-${number}${suffix}`;
    names.set(file, name);
  }
  return names;
}

function filesIn(value) {
  if (value instanceof File) return [value];
  return value instanceof Object ? Object.values(value).flatMap(filesIn) : [];
}

/** Write a value as JSON or as Python, which differ in strings and files only. */
function literal(value, style) {
  if (value instanceof File) return style.file(value);
  if (typeof value === "string") return style.string(value);
  if (Array.isArray(value)) return `[${value.map((entry) => literal(entry, style)).join(", ")}]`;
  if (typeof value !== "object") return String(value);
  const entries = Object.entries(value).map(([name, entry]) => `${style.string(name)}: ${literal(entry, style)}`);
  return `{${entries.join(", ")}}`;
}

function curl(request, names, { hasKey }) {
  const style = {
    // A here-document whose delimiter is not quoted expands commands; these three are special in it.
    string: (text) => JSON.stringify(text).replace(/[\\$`]/g, "\\$&"),
    file: (file) => `"$(base64 < '${names.get(file).replaceAll("'", "'\\''")}' | tr -d '\\n')"`,
  };
  const fields = Object.entries(request).map(([name, value]) => `  "${name}": ${literal(value, style)}`);
  const format = request.output_format ?? "png";
  // An answer that is a file holds one picture; several come as JSON.
  const single = (request.num_images_per_prompt ?? 1) === 1;
  const headers = ['-H "Content-Type: application/json"'];
  if (single) headers.push(`-H "Accept: image/${format}"`);
  if (hasKey) headers.push('-H "Authorization: Bearer $IMPROMPT_API_KEY"');
  const save =
    `import base64, json, sys; [open(f"out-{i}.${format}", "wb").write(base64.b64decode(picture["b64_json"])) ` +
    'for i, picture in enumerate(json.load(sys.stdin)["data"])]';
  return [
    `curl --fail-with-body ${new URL("v1/images/generations", document.baseURI)} \\`,
    `  ${headers.join(" ")} \\`,
    `  --data-binary @- <<JSON ${single ? `-o out.${format}` : `| python3 -c '${save}'`}`,
    "{",
    fields.join(",\n"),
    "}",
    "JSON",
    "",
  ].join("\n");
}

function python(request, names) {
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
    `result.save("out.${request.output_format ?? "png"}")`,
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

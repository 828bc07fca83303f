
"use strict";
// Text from the model and the server reaches the document as textContent only.
const element = id => document.getElementById(id);
const model = JSON.parse(element("model").textContent);
const url = location.origin + location.pathname;
const DELAY_MS = 150; // from the last move of a slider to the request
const RATE_MS = 3000; // the time over which the rate is counted
const MOST_LISTED = 12; // classes that are listed without having been found

const items = []; // chosen images: {name, blob, address, key, answer, text, error, ms}
let current = -1;
let bitmap = null; // of what is shown
let shown = null; // the item that is shown: one of items, or a frame of the webcam
let busy = false; // one request at a time
let stream = null; // of the webcam
let token = "";
let timer = 0;
const hidden = new Set(); // classes switched off
const finished = []; // times of answers

// ---- the server

function options() {
  return { score_threshold: element("score_threshold").value, iou_threshold: element("iou_threshold").value };
}

function key() {
  return JSON.stringify([options(), token]);
}

function headers() {
  const all = { "Content-Type": "application/octet-stream" };
  for (const [name, value] of Object.entries(options())) {
    all["X-Detect-" + name.split("_").map(word => word[0].toUpperCase() + word.slice(1)).join("-")] = value;
  }
  return token ? { ...all, Authorization: "Bearer " + token } : all;
}

async function detect(item) {
  item.key = key();
  item.answer = item.error = null;
  const started = performance.now();
  try {
    const response = await fetch(url, { method: "POST", body: item.blob, headers: headers(), cache: "no-store" });
    item.text = await response.text();
    item.ms = performance.now() - started;
    const answer = parse(item.text);
    if (response.ok && answer && Array.isArray(answer.detections)) {
      item.answer = answer;
      finished.push(performance.now());
    } else {
      const message = (answer && (answer.message || answer.error)) || "no explanation";
      item.error = { status: response.status, message: `${response.status}: ${message}` };
    }
  } catch (error) {
    item.text = "";
    item.error = { status: 0, message: "The server cannot be reached." };
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    return null;
  }
}

// Sends the present image until its answer belongs to the present settings.
async function update() {
  if (busy || stream) {
    return;
  }
  busy = true;
  while (!stream && current >= 0 && items[current].key !== key()) {
    const item = items[current];
    showRequest(item);
    await detect(item);
    if (items[current] === item && !stream) {
      show();
    }
  }
  busy = false;
}

// ---- images

function add(files) {
  const first = items.length;
  for (const file of files) {
    items.push({ name: file.name || "pasted image", blob: file, address: URL.createObjectURL(file) });
  }
  if (items.length > first) {
    stopCamera();
    listThumbnails();
    select(first);
  }
}

async function select(index) {
  if (!items.length) {
    return;
  }
  current = (index + items.length) % items.length;
  const item = items[current];
  let picture = null;
  try {
    picture = await createImageBitmap(item.blob);
  } catch (error) {
    // No image, or one that this browser cannot show; the server says which.
  }
  if (items[current] !== item || stream) {
    return;
  }
  setPicture(picture, item);
  markThumbnail();
  show();
  update();
}

function setPicture(picture, item) {
  if (bitmap) {
    bitmap.close();
  }
  bitmap = picture;
  shown = item;
}

function clearAll() {
  stopCamera();
  items.forEach(item => URL.revokeObjectURL(item.address));
  items.length = 0;
  current = -1;
  setPicture(null, null);
  listThumbnails();
  show();
  element("choose").focus();
}

function listThumbnails() {
  const several = items.length > 1;
  element("thumbnails").replaceChildren(...(several ? items : []).map((item, index) => {
    const image = document.createElement("img");
    image.src = item.address;
    image.alt = item.name;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `${item.name}, image ${index + 1} of ${items.length}`);
    button.append(image);
    button.addEventListener("click", () => { stopCamera(); select(index); });
    const entry = document.createElement("li");
    entry.append(button);
    return entry;
  }));
  element("clear").hidden = !items.length;
  element("steps").hidden = !several;
}

function markThumbnail() {
  element("position").textContent = `${current + 1} of ${items.length}`;
  element("thumbnails").querySelectorAll("button").forEach((button, index) => {
    button.setAttribute("aria-current", String(index === current));
    if (index === current) {
      button.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  });
}

// ---- the webcam

async function startCamera() {
  if (!navigator.mediaDevices) {
    showError({ status: 0, message: "The webcam needs an address with https, or localhost." });
    return;
  }
  let opened;
  try {
    opened = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, facingMode: "environment" } });
  } catch (error) {
    showError({ status: 0, message: "No webcam: " + error.message });
    return;
  }
  stopCamera();
  stream = opened;
  element("camera").textContent = "Stop webcam";
  element("summary").setAttribute("aria-live", "off"); // it changes with every frame
  const video = document.createElement("video");
  video.muted = true;
  video.playsInline = true;
  video.srcObject = opened;
  await video.play();
  while (busy) {
    await new Promise(resolve => setTimeout(resolve, 20)); // the request of an image
  }
  busy = true;
  const error = await streamFrames(video, opened);
  busy = false;
  if (stream === opened) {
    stopCamera();
  }
  if (error) {
    showError(error);
  } else {
    update();
  }
}

// Sends one frame after another until the webcam is stopped; returns the error that ended it.
async function streamFrames(video, opened) {
  const frame = document.createElement("canvas");
  while (stream === opened) {
    frame.width = video.videoWidth;
    frame.height = video.videoHeight;
    frame.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise(resolve => frame.toBlob(resolve, "image/jpeg", 0.9));
    const item = { name: "frame.jpg", blob };
    await detect(item);
    if (stream === opened && item.error) {
      return item.error;
    }
    if (stream === opened) {
      setPicture(await createImageBitmap(frame), item);
      show();
    }
  }
  return null;
}

function stopCamera() {
  if (!stream) {
    return;
  }
  stream.getTracks().forEach(track => track.stop());
  stream = null;
  element("camera").textContent = "Webcam";
  element("summary").setAttribute("aria-live", "polite");
}

// The last frame stays, as an image.
function freezeCamera() {
  const isFrame = stream && shown && shown.answer && !items.includes(shown);
  stopCamera();
  if (isFrame) {
    add([new File([shown.blob], "webcam.jpg", { type: "image/jpeg" })]);
  }
}

// ---- what is shown

function visible(item) {
  return item && item.answer ? item.answer.detections.filter(found => !hidden.has(found.label)) : [];
}

function show() {
  const answer = shown && shown.answer;
  element("hint").hidden = Boolean(shown);
  element("canvas").hidden = !bitmap && !answer;
  showError(shown && shown.error);
  showRequest(shown);
  showSummary();
  showClasses();
  draw();
}

function showError(error) {
  element("error").hidden = !error;
  element("message").textContent = error ? error.message : "";
  if (error && (error.status === 401 || error.status === 403)) {
    element("access").hidden = false;
  } else if (shown && shown.answer) {
    element("access").hidden = true;
  }
}

function countByClass(detections) {
  const counts = new Map();
  detections.forEach(found => counts.set(found.label, (counts.get(found.label) || 0) + 1));
  return counts;
}

function showSummary() {
  const detections = visible(shown);
  const counts = [...countByClass(detections)].map(([label, count]) => `${count} ${label}`).join(", ");
  const known = shown && shown.answer;
  const text = known ? `${shown.name}: ${counts || "nothing found"}` : shown ? shown.name : "No image yet.";
  element("summary").textContent = text;
  element("canvas").setAttribute("aria-label", text);
  element("count").textContent = known ? detections.length : "\u2013";
  element("latency").textContent = shown && shown.ms ? `${Math.round(shown.ms)} ms` : "\u2013";
  while (finished.length && finished[0] < performance.now() - RATE_MS) {
    finished.shift();
  }
  const seconds = finished.length > 1 ? (finished[finished.length - 1] - finished[0]) / 1000 : 0;
  element("rate").textContent = stream && seconds ? `${((finished.length - 1) / seconds).toFixed(1)}/s` : "\u2013";
}

// The switches are kept while the list stays the same, so that the focus is too.
function showClasses() {
  const counts = countByClass(shown && shown.answer ? shown.answer.detections : []);
  const isListed = entry => model.classes.length <= MOST_LISTED || counts.has(entry.name) || hidden.has(entry.name);
  const listed = model.classes.filter(isListed);
  const group = element("classes");
  const before = [...group.children].map(label => label.dataset.name);
  if (JSON.stringify(before) !== JSON.stringify(listed.map(entry => entry.name))) {
    group.replaceChildren(...listed.map(classSwitch));
  }
  for (const label of group.children) {
    label.querySelector(".number").textContent = counts.get(label.dataset.name) || 0;
  }
}

function classSwitch({ name, colour }) {
  const label = document.createElement("label");
  label.dataset.name = name;
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = !hidden.has(name);
  box.addEventListener("change", () => {
    hidden[box.checked ? "delete" : "add"](name);
    showSummary();
    draw();
  });
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.backgroundColor = colour;
  const text = document.createElement("span");
  text.textContent = name;
  const number = document.createElement("span");
  number.className = "number";
  label.append(box, swatch, text, number);
  return label;
}

function showRequest(item) {
  const quoted = text => (/^[\w.:/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const file = item ? item.name : "image.jpg"; // one that begins with - would be an option
  const lines = [`curl --max-time 60 -T ${quoted(file.startsWith("-") ? "./" + file : file)}`, quoted(url)];
  for (const [name, value] of Object.entries(headers())) {
    if (name.startsWith("X-Detect-")) {
      lines.push(`-H '${name}: ${value}'`);
    }
  }
  if (token) {
    lines.push('-H "Authorization: Bearer $TOKEN"');
  }
  element("curl").textContent = lines.join(" \\\n  ");
  element("json").textContent = item && item.text ? pretty(item) : "\u2013";
}

// A detection to a line.
function pretty(item) {
  const answer = item.answer;
  if (!answer) {
    return item.text.slice(0, 10000);
  }
  const rows = answer.detections.map(found => "  " + JSON.stringify(found)).join(",\n");
  return `{"width": ${answer.width}, "height": ${answer.height}, "detections": [\n${rows}\n]}`;
}

// ---- drawing

function draw() {
  const canvas = element("canvas");
  const answer = shown && shown.answer;
  const size = bitmap || answer;
  if (!size || canvas.hidden) {
    return;
  }
  const limit = Math.max(300, innerHeight - 190);
  const scale = Math.min(element("stage").clientWidth / size.width, limit / size.height, 2);
  const [width, height] = [size.width * scale, size.height * scale];
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  if (bitmap) {
    context.drawImage(bitmap, 0, 0, width, height);
  }
  const found = visible(shown).map(detection => ({
    ...detection,
    colour: (model.classes[detection.class_id] || { colour: "#888888" }).colour,
    box: detection.bbox.map(value => value * scale),
  }));
  [...found].reverse().forEach(detection => drawBox(context, detection)); // the best on top
  const taken = [];
  found.forEach(detection => drawLabel(context, detection, width, height, taken));
}

function drawBox(context, { box: [x1, y1, x2, y2], colour }) {
  context.lineWidth = 2;
  context.strokeStyle = colour;
  context.strokeRect(x1 + 1, y1 + 1, Math.max(1, x2 - x1 - 2), Math.max(1, y2 - y1 - 2));
}

// At a corner of the box where no other label is; the first place where all are taken.
function drawLabel(context, { box: [x1, y1, x2, y2], colour, label, score }, width, height, taken) {
  context.font = "600 11px system-ui, 'DejaVu Sans', sans-serif";
  const text = `${label} ${score.toFixed(2)}`;
  const [w, h] = [context.measureText(text).width + 8, 16];
  const places = [[x1, y1 - h], [x1, y1], [x2 - w, y1], [x1, y2 - h], [x1, y2], [x2 - w, y2 - h]].map(([x, y]) =>
    [Math.max(0, Math.min(x, width - w)), Math.max(0, Math.min(y, height - h))]);
  const overlap = ([x, y]) => taken.some(([a, b, c]) => x < a + c && a < x + w && y < b + h && b < y + h);
  const [x, y] = places.find(place => !overlap(place)) || places[0];
  taken.push([x, y, w]);
  context.fillStyle = colour;
  context.fillRect(x, y, w, h);
  const [red, green, blue] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  context.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 128 ? "#000" : "#fff";
  context.textBaseline = "middle";
  context.fillText(text, x + 4, y + h / 2 + 0.5);
}

// ---- events

async function copy(source, button) {
  const selection = getSelection();
  selection.selectAllChildren(source);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch (error) {
    document.execCommand("copy"); // without https
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function prepareSlider(id) {
  const slider = element(id);
  slider.value = model[id];
  const showValue = () => { element(id + "_value").textContent = Number(slider.value).toFixed(2); };
  showValue();
  slider.addEventListener("input", () => {
    showValue();
    clearTimeout(timer);
    timer = setTimeout(update, DELAY_MS);
  });
}

function prepareDropping() {
  const stage = element("stage");
  document.addEventListener("dragover", event => {
    event.preventDefault();
    stage.classList.add("dragged");
  });
  document.addEventListener("dragleave", event => {
    if (!event.relatedTarget) {
      stage.classList.remove("dragged");
    }
  });
  document.addEventListener("drop", event => {
    event.preventDefault();
    stage.classList.remove("dragged");
    add(event.dataTransfer.files);
  });
  document.addEventListener("paste", event => add(event.clipboardData.files));
}

function handleKey(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") {
    freezeCamera();
  } else if (step && items.length > 1 && !event.target.closest("input, pre") && !event.ctrlKey && !event.altKey) {
    stopCamera();
    select(current + step);
    event.preventDefault();
  }
}

function sendAgain() {
  items.forEach(item => { item.key = ""; });
  showError(null);
  select(Math.max(0, current));
}

const segments = location.pathname.split("/").filter(Boolean);
const at = Math.max(segments.indexOf("predictions"), segments.indexOf("models")) + 1;
const name = at ? decodeURIComponent(segments[at] || "") : "";
element("name").textContent = document.title = name || "DAMO-YOLO";
const classCount = `${model.classes.length} class${model.classes.length === 1 ? "" : "es"}`;
element("about").textContent = `DAMO-YOLO-${model.variant}, ${classCount}`;
element("formats").textContent = model.image_formats.join(", ");
prepareSlider("score_threshold");
prepareSlider("iou_threshold");
prepareDropping();
element("choose").addEventListener("click", () => element("files").click());
element("files").addEventListener("change", event => {
  add(event.target.files);
  event.target.value = "";
});
element("camera").addEventListener("click", () => (stream ? freezeCamera() : startCamera()));
element("clear").addEventListener("click", clearAll);
element("previous").addEventListener("click", () => { stopCamera(); select(current - 1); });
element("next").addEventListener("click", () => { stopCamera(); select(current + 1); });
element("again").addEventListener("click", sendAgain);
element("access").addEventListener("submit", event => {
  event.preventDefault();
  token = element("token").value.trim();
  sendAgain();
});
element("copy_curl").addEventListener("click", event => copy(element("curl"), event.target));
element("copy_json").addEventListener("click", event => copy(element("json"), event.target));
document.addEventListener("keydown", handleKey);
addEventListener("resize", draw);
show();

"use strict";

const MAX_MB = 10; // of what is sent, as in demo_app.py
const MAX_SIDE = 1600; // pixels of a picture that is sent; as a PNG file it has less than MAX_MB in any case
const BRUSH = 0.03; // the stroke's width, of the drawing's side: digits of all sizes have room for their loops
const SENT_SIDE = 300; // pixels of the drawing as it is read, on every screen
const MARGIN = 10; // of them on each side stay white, so that what is drawn up to the edge is no printed line
const LIVE_MS = 100; // from an answer to the next question while a stroke goes on
const EXAMPLE_MS = 450; // to draw an example's stroke
const RETRY_MS = 2000; // from a failed question about the model to the next
// Matplotlib's cividis at equal steps: even steps to the eye, with any colour vision.
const CIVIDIS = [[0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
                 [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56]];
const COVER = 0.6; // how much of the image the attention's colour covers

const element = (id) => document.getElementById(id);
const drawing = element("drawing");
let invitation = "Draw a digit first: the answer stands here.";
let hint = "Draw here, or drop a picture";
let strokes = []; // each a list of points [x, y], 0 to 1
let upload = null; // a picture's { name, image, file }, image null where the browser can't show it
let digits = []; // read in what stands there
let selected = 0; // of them, the one whose probabilities are shown
let finished = false; // an example or upload: the next stroke begins a new drawing
let sheet = 0; // number of the drawing: a cleared one is another
let pen = null; // the pointer that draws
let asked = 0; // number of the last question
let shown = 0; // number of the question whose answer stands on the page
let open = 0; // questions without an answer yet
let answeredAt = 0;
let classNames = [];
let words = {}; // for what the model tells apart: as in words.py, { one, many, strange, strange_key }
const MOST_BARS = 5; // of other classes than digits: the likeliest

// ---- drawing ------------------------------------------------------------------------------------

function trace(context, stroke, side) {
  context.beginPath();
  context.moveTo(stroke[0][0] * side, stroke[0][1] * side);
  for (let i = 1; i < stroke.length - 1; i++) { // a curve through the middles is smooth
    const [[x, y], [nextX, nextY]] = [stroke[i], stroke[i + 1]];
    context.quadraticCurveTo(x * side, y * side, (x + nextX) / 2 * side, (y + nextY) / 2 * side);
  }
  const [x, y] = stroke.at(-1);
  context.lineTo(x * side, y * side + 0.01); // of no length at all it would leave no dot
  context.stroke();
}

function paint(context, side, ink) {
  Object.assign(context, { strokeStyle: ink, lineWidth: BRUSH * side, lineCap: "round", lineJoin: "round" });
  for (const stroke of strokes) trace(context, stroke, side);
}

function redraw() {
  const side = Math.round(drawing.clientWidth * devicePixelRatio);
  drawing.width = drawing.height = side;
  const context = drawing.getContext("2d");
  if (upload?.image) {
    const { image } = upload;
    const scale = side / Math.max(image.width, image.height);
    const [width, height] = [image.width * scale, image.height * scale];
    const place = [(side - width) / 2, (side - height) / 2, width, height];
    context.fillStyle = "grey"; // behind transparent ink, be it black or white
    context.fillRect(...place);
    context.drawImage(image, ...place);
  }
  paint(context, side, getComputedStyle(drawing).color);
  element("hint").textContent = upload ? `${upload.name} is here, but this browser cannot show it` : hint;
  element("hint").hidden = strokes.length || upload?.image;
  element("undo").disabled = element("clear").disabled = !strokes.length && !upload;
}

/** The drawing in SENT_SIDE x SENT_SIDE bytes, black on white whatever the colours of the page. */
function drawnPixels() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SENT_SIDE;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, SENT_SIDE, SENT_SIDE);
  const side = SENT_SIDE - 2 * MARGIN;
  context.translate(MARGIN, MARGIN);
  context.rect(0, 0, side, side);
  context.clip();
  paint(context, side, "black");
  const { data } = context.getImageData(0, 0, SENT_SIDE, SENT_SIDE); // red, green, blue, alpha, ...
  const grey = new Uint8Array(SENT_SIDE ** 2);
  for (let i = 0; i < grey.length; i++) grey[i] = data[4 * i];
  return grey;
}

function clear() {
  strokes = [];
  upload = pen = null;
  selected = 0;
  finished = false;
  sheet++;
  shown = ++asked; // answers on their way are of no interest any more
  redraw();
  showNothing(invitation);
}

function undo() {
  if (pen !== null) return;
  if (upload || strokes.length < 2) return clear();
  sheet++; // an example that is being drawn ends
  finished = false; // and can be drawn on
  strokes.pop();
  redraw();
  askAboutDrawing(performance.now());
}

// ---- asking: `reader`, of server.js or in_page.js, answers --------------------------------------

function askAboutDrawing(since, final = true) {
  return showAnswerTo(reader.readDrawing(drawnPixels(), SENT_SIDE), since, final);
}

/** Wait for an answer; show it unless that to a later question stands there already. */
async function showAnswerTo(question, since, final = true) {
  const number = ++asked;
  open++;
  const answer = await question;
  open--;
  answeredAt = performance.now();
  if (number <= shown || (answer.error && !final)) return;
  if (!classNames.length && !answer.error) return; // showModel asks again
  shown = number;
  if (answer.error) {
    if (upload) { [upload, finished] = [null, false]; redraw(); }
    return showNothing(answer.error, true);
  }
  showAnswer(answer, final, since);
}

// ---- showing ------------------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function say(words, more, state) {
  element("words").textContent = words;
  element("more").textContent = more;
  element("answer").className = state;
}

function showNothing(words, isError = false) {
  words = words[0].toUpperCase() + words.slice(1);
  digits = [];
  element("boxes").replaceChildren();
  element("digit").textContent = isError ? "!" : "?";
  element("took").textContent = "";
  say(words, "", isError ? "error" : "idle");
  element("status").textContent = isError ? words : "";
  showBars(classNames.map(() => 0));
  for (const id of ["received", "attention"]) {
    const { width, height } = element(id);
    element(id).getContext("2d").clearRect(0, 0, width, height);
    element(id).ariaLabel = "Nothing yet";
  }
  [element("least").textContent, element("most").textContent] = ["less", "more"];
}

/** The classes of a digit with their shares, the likeliest first. */
function ranking({ probabilities }) {
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  return order.map((i) => `${classNames[i]} with ${percent(probabilities[i])}`);
}

function showAnswer(answer, final, since) {
  digits = answer[words.many];
  element("digit").replaceChildren(...digits.map(digitButton));
  // On the pad a drawing's only digit needs no frame, and a picture that isn't shown has no place for one.
  const framed = takesPictures() ? false : upload ? upload.image : digits.length > 1;
  element("boxes").replaceChildren(...(framed ? digits.map((digit, i) => frame(digit, i, answer.size)) : []));
  element("boxes").className = upload ? "clickable" : "";
  select(Math.min(selected, digits.length - 1));
  element("took").textContent = "";
  if (!final) return;
  const number = digits.length > 1 ? `${digits.map((digit) => digit.prediction).join("")}: ` : "";
  const each = digits.map((digit) => ranking(digit)[0] + (digit[words.strange_key] ? `, which ${words.strange}` : ""));
  element("status").textContent = `This looks like ${number}${each.join("; ")}.`;
  requestAnimationFrame(() => setTimeout(() => { // once it is painted
    const { duration } = performance.measure("answer", { start: since });
    element("took").textContent = `answered in ${Math.round(duration)} ms`;
  }));
}

function digitButton({ prediction, [words.strange_key]: strange }, i) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = prediction;
  button.ariaLabel = `${prediction}, ${words.one} ${i + 1} of ${digits.length}`;
  button.className = strange ? "strange" : "";
  button.disabled = digits.length === 1;
  button.onclick = () => select(i);
  return button;
}

/** A frame around a digit on the pad, of a picture of [width, height] that was sent. */
function frame({ box: [left, top, right, bottom], [words.strange_key]: strange }, i, [width, height]) {
  const side = upload ? Math.max(width, height) : SENT_SIDE - 2 * MARGIN; // as much of it as the pad shows
  const share = (length) => `${100 * length / side}%`;
  const line = document.createElement("i");
  line.style.left = share(left + (side - width) / 2);
  line.style.top = share(top + (side - height) / 2);
  line.style.width = share(right - left);
  line.style.height = share(bottom - top);
  line.className = strange ? "strange" : "";
  line.onclick = () => select(i);
  return line;
}

/** Show all about one of the digits. */
function select(i) {
  selected = i;
  for (const id of ["digit", "boxes"]) {
    [...element(id).children].forEach((child, j) => { child.ariaCurrent = i === j; });
  }
  const [best, second] = ranking(digits[i]);
  const several = digits.length > 1 && `${capital(words.one)} ${i + 1} of ${digits.length}`;
  if (digits[i][words.strange_key]) {
    say(`${several || "This"} ${words.strange}`, `most like ${best}`, "strange");
  } else {
    const next = !second || second.endsWith(" 0.0 %") ? "" : `next: ${second}`;
    say(several ? `${several}: ${best}` : `Probability ${percent(Math.max(...digits[i].probabilities))}`, next, "");
  }
  showBars(digits[i].probabilities);
  showImage(digits[i]);
  showAttention(digits[i]);
}

function showBars(probabilities) {
  const best = Math.max(...probabilities);
  const order = probabilities.map((_, i) => i);
  if (!readsDigits()) order.sort((a, b) => probabilities[b] - probabilities[a]);
  [...element("bars").children].forEach((row, place) => {
    const i = order[place], share = probabilities[i];
    row.querySelector("span").textContent = best || readsDigits() ? classNames[i] : "";
    row.className = share > 0 && share === best ? "winner" : "";
    row.querySelector("i").style.setProperty("--share", percent(share).replace(" ", ""));
    row.querySelector("b").textContent = best ? percent(share) : "–";
  });
}

/** Fill a canvas of side x side pixels with the colours [red, green, blue] of color(row, column). */
function fill(canvas, side, color) {
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  for (let i = 0; i < side ** 2; i++) image.data.set([...color(Math.floor(i / side), i % side), 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** [red, green, blue] of a pixel, which may be a grey value. */
const inColor = (pixel) => Array.isArray(pixel) ? pixel : [pixel, pixel, pixel];

function showImage({ prediction, received }) {
  const size = received.length;
  fill(element("received"), size, (row, column) => inColor(received[row][column]));
  const what = takesPictures() ? "The picture" : `The ${prediction}, white on black,`;
  element("received").ariaLabel = `${what} as ${size} by ${size} pixels`;
}

function showAttention({ received, attention }) {
  const [side, size] = [attention.length, received.length];
  const [least, most] = [Math.min(...attention.flat()), Math.max(...attention.flat())];
  fill(element("attention"), size, (row, column) => {
    const value = attention[Math.floor(row * side / size)][Math.floor(column * side / size)];
    const color = cividis((value - least) / (most - least || 1));
    const [red, green, blue] = inColor(received[row][column]);
    const grey = 0.299 * red + 0.587 * green + 0.114 * blue;
    return color.map((channel) => COVER * channel + (1 - COVER) * grey);
  });
  const strongest = attention.flat().indexOf(most);
  element("attention").ariaLabel = `Attention on ${side} by ${side} patches, most in row ` +
    `${Math.floor(strongest / side) + 1}, column ${strongest % side + 1}`;
  [element("least").textContent, element("most").textContent] = [percent(least), percent(most)];
}

function cividis(value) {
  const place = value * (CIVIDIS.length - 1);
  const below = Math.min(Math.floor(place), CIVIDIS.length - 2);
  return CIVIDIS[below].map((low, i) => low + (CIVIDIS[below + 1][i] - low) * (place - below));
}

const readsDigits = () => words.many === "digits";
const takesPictures = () => words.many === "pictures";
const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** Speak of what this model takes, where that is no digits. */
function adapt({ image_size: size, preparation }) {
  let title = `Draw a ${words.one}`, subtitle = "Or several: a Vision Transformer reads them while you draw.";
  invitation = `Draw a ${words.one} first: the answer stands here.`;
  element("file").ariaLabel = `Picture of a ${words.one}`;
  element("drawing").ariaLabel = `Drawing area: draw ${words.many} with mouse, finger or pen`;
  if (takesPictures()) {
    [title, subtitle] = ["What is in the picture?", "A Vision Transformer says what it takes it for, and where it looked."];
    invitation = "Choose a picture first: the answer stands here.";
    hint = "Drop a picture here, paste or upload one";
    element("file").ariaLabel = "Picture";
    element("drawing").ariaLabel = "The picture";
    document.querySelector(".views p").textContent = `${size}×${size} pixels: ${preparation}`;
  }
  document.title = `${title} · vit-mnist`;
  document.querySelector("h1").textContent = title;
  document.querySelector("header p").textContent = subtitle;
  document.body.className = words.many; // style.css hides what is of no use
}

async function showModel() {
  const model = await reader.describe();
  if (model.error) {
    showNothing(model.error, true);
    return setTimeout(showModel, RETRY_MS);
  }
  [classNames, words] = [model.class_names, model.words];
  if (!readsDigits()) adapt(model);
  const bars = readsDigits() ? classNames : classNames.slice(0, MOST_BARS);
  element("bars").replaceChildren(...bars.map((name) => {
    const row = document.createElement("li");
    const parts = ["span", "i", "b"].map((tag) => document.createElement(tag));
    parts[0].textContent = name;
    row.append(...parts);
    return row;
  }));
  element("about").textContent = `The model: ${model.parameters.toLocaleString("en")} parameters, trained on ` +
    `${model.dataset.replace(/^mnist$/, "MNIST")}, ${model.validation.toFixed(2)} % right in validation. ${reader.note}`;
  if (upload) readFile(upload.file); // chosen or drawn meanwhile
  else if (strokes.length) askAboutDrawing(performance.now());
  else clear();
}

// ---- mouse, finger, pen -------------------------------------------------------------------------

function place(event) {
  const box = drawing.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

drawing.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || takesPictures()) return;
  if (pen !== null && event.pointerType !== "pen") return; // the palm beside it
  if (finished) clear();
  drawing.setPointerCapture(event.pointerId);
  pen = event.pointerId;
  strokes.push([place(event)]);
  redraw();
});

drawing.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pen) return;
  const events = event.getCoalescedEvents?.() ?? [];
  strokes.at(-1).push(...(events.length ? events : [event]).map(place));
  redraw();
  if (!open && performance.now() - answeredAt > LIVE_MS) askAboutDrawing(performance.now(), false);
});

for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
  drawing.addEventListener(end, (event) => {
    if (event.pointerId !== pen) return;
    pen = null;
    askAboutDrawing(event.timeStamp);
  });
}

// ---- buttons, examples, files -------------------------------------------------------------------

element("clear").addEventListener("click", clear);
element("undo").addEventListener("click", undo);
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
});

function points(path) {
  const length = path.getTotalLength();
  return Array.from({ length: 41 }, (_, i) => {
    const { x, y } = path.getPointAtLength(length * i / 40);
    return [x / 100, y / 100];
  });
}

const nextFrame = () => new Promise(requestAnimationFrame);

async function drawExample(paths) {
  clear();
  finished = true;
  const mine = sheet;
  const duration = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : EXAMPLE_MS;
  for (const stroke of paths.map(points)) {
    const begun = performance.now();
    const [before, count] = [strokes, stroke.length];
    for (let drawn = 1; drawn < count;) {
      const share = duration ? (await nextFrame() - begun) / duration : 1;
      if (sheet !== mine) return;
      drawn = Math.max(1, Math.min(count, Math.round(share * count)));
      strokes = [...before, stroke.slice(0, drawn)];
      redraw();
    }
    askAboutDrawing(performance.now());
  }
}

for (const button of document.querySelectorAll("#examples button")) {
  button.addEventListener("click", () => drawExample([...button.querySelectorAll("path")]));
}

async function readFile(file) {
  const since = performance.now();
  clear();
  finished = true; // a stroke meanwhile begins a drawing in its place
  if (!reader.readPicture) return showNothing(element("photos").textContent, true);
  const mine = sheet;
  const image = await createImageBitmap(file).catch(() => null); // the server may know more formats
  const body = image ? await fitting(file, image) : file;
  if (sheet !== mine) return;
  if (body.size > MAX_MB * 2 ** 20) {
    return showNothing(`This file has ${Math.ceil(file.size / 2 ** 20)} MB, expected at most ${MAX_MB} MB.`, true);
  }
  upload = { name: file.name, image, file };
  redraw();
  await showAnswerTo(reader.readPicture(body), since);
}

/** The file, or in place of one that is too large, or that the server can't read, a PNG file of at most MAX_SIDE pixels. */
async function fitting(file, image) {
  const scale = Math.min(1, MAX_SIDE / Math.max(image.width, image.height));
  const isRead = /^image\/(png|jpeg|gif|bmp|tiff|webp)$/.test(file.type);
  if (scale === 1 && file.size <= MAX_MB * 2 ** 20 && isRead) return file;
  const canvas = new OffscreenCanvas(Math.ceil(image.width * scale), Math.ceil(image.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob();
}

element("upload").addEventListener("click", () => element("file").click());
element("file").addEventListener("change", ({ target }) => {
  if (target.files.length) readFile(target.files[0]);
  target.value = ""; // so that the same file may be chosen again
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) readFile(event.clipboardData.files[0]);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  element("pad").classList.add("dropping");
});
for (const end of ["dragleave", "drop"]) {
  document.addEventListener(end, () => element("pad").classList.remove("dropping"));
}
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) readFile(event.dataTransfer.files[0]);
});

// ---- start --------------------------------------------------------------------------------------

element("legend").querySelector("i").style.background =
  `linear-gradient(to right, ${CIVIDIS.map((color) => `rgb(${color})`)})`;
new ResizeObserver(redraw).observe(element("pad"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
if (!reader.readPicture) {
  hint = "Draw here";
  [element("upload").hidden, element("photos").hidden] = [true, false];
}
showModel();

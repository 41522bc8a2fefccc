// A picture on a canvas, cropped to a square, and where there is a brush what it marks of it. `picture()` of the canvas gives a
// data address: with a brush a PNG, transparent where the brush was; without one the file itself, a large one smaller. Runs as
// gradio's js_on_load: `element` is the component, `props` has side and gallery.
const MOST_BYTES = 1.5 * 2 ** 20, MOST_SIDE = 2048;
const side = props.side, canvas = element.querySelector("canvas"), shown = canvas.getContext("2d");
const layer = (width, height) => Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
const base = layer(side, side), hole = layer(side, side), brush = element.querySelector("[type=range]");
let opened = null;
canvas.width = canvas.height = side;

function show() {
  shown.clearRect(0, 0, side, side);
  shown.drawImage(base.canvas, 0, 0);
  shown.globalAlpha = 0.6;
  shown.drawImage(hole.canvas, 0, 0);
  shown.globalAlpha = 1;
}

async function open(file) {
  const image = await createImageBitmap(file), { width, height } = image, least = Math.min(width, height);
  base.clearRect(0, 0, side, side);
  base.drawImage(image, (width - least) / 2, (height - least) / 2, least, least, 0, 0, side, side);
  hole.clearRect(0, 0, side, side);
  opened = { file, image };
  show();
}

function paint(event) {
  if (!event.buttons || !opened) return;
  const box = canvas.getBoundingClientRect();
  hole.fillStyle = "#f0f";
  hole.beginPath();
  hole.arc(
    ((event.clientX - box.left) / box.width) * side,
    ((event.clientY - box.top) / box.height) * side,
    Math.max(1, (brush.value / 200) * side), 0, 7
  );
  hole.fill();
  show();
}

if (brush) {
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); paint(event); });
  canvas.addEventListener("pointermove", paint);
  element.querySelector(".clear").addEventListener("click", () => { hole.clearRect(0, 0, side, side); show(); });
}
element.querySelector("[type=file]").addEventListener("change", async (event) => {
  if (event.target.files[0]) await open(event.target.files[0]);
});
element.querySelector(".take").addEventListener("click", async () => {
  const drawn = document.querySelector(`#${props.gallery} img`);
  if (drawn) await open(await (await fetch(drawn.src)).blob());
});

function painted() {
  const whole = layer(side, side);
  whole.drawImage(base.canvas, 0, 0);
  whole.globalCompositeOperation = "destination-out";
  whole.drawImage(hole.canvas, 0, 0);
  return whole.canvas.toDataURL("image/png");
}

function sent({ file, image }) {
  if (["image/png", "image/jpeg", "image/webp"].includes(file.type) && file.size <= MOST_BYTES)
    return new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.readAsDataURL(file);
    });
  const scale = Math.min(1, MOST_SIDE / Math.max(image.width, image.height));
  const smaller = layer(image.width * scale, image.height * scale);
  smaller.drawImage(image, 0, 0, smaller.canvas.width, smaller.canvas.height);
  return smaller.canvas.toDataURL(file.size <= MOST_BYTES ? "image/png" : "image/jpeg", 0.9);
}

canvas.picture = async () => (opened ? (brush ? painted() : sent(opened)) : "");

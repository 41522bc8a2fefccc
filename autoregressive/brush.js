// A picture on a canvas, and a brush that marks what of it is to be filled. `picture()` of the canvas gives a PNG as text,
// transparent where the brush was. Runs as gradio's js_on_load: `element` is the component, `props` has side and gallery.
const side = props.side, canvas = element.querySelector("canvas"), shown = canvas.getContext("2d");
const layer = () => Object.assign(document.createElement("canvas"), { width: side, height: side }).getContext("2d");
const base = layer(), hole = layer();
let opened = false;
canvas.width = canvas.height = side;

function show() {
  shown.clearRect(0, 0, side, side);
  shown.drawImage(base.canvas, 0, 0);
  shown.globalAlpha = 0.6;
  shown.drawImage(hole.canvas, 0, 0);
  shown.globalAlpha = 1;
}

function open(image) {
  const { width, height } = image, least = Math.min(width, height);
  base.clearRect(0, 0, side, side);
  base.drawImage(image, (width - least) / 2, (height - least) / 2, least, least, 0, 0, side, side);
  hole.clearRect(0, 0, side, side);
  opened = true;
  show();
}

function paint(event) {
  if (!event.buttons || !opened) return;
  const box = canvas.getBoundingClientRect(), percent = element.querySelector("[type=range]").value;
  hole.fillStyle = "#f0f";
  hole.beginPath();
  hole.arc(
    ((event.clientX - box.left) / box.width) * side,
    ((event.clientY - box.top) / box.height) * side,
    Math.max(1, (percent / 200) * side), 0, 7
  );
  hole.fill();
  show();
}

canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); paint(event); });
canvas.addEventListener("pointermove", paint);
element.querySelector("[type=file]").addEventListener("change", async (event) => {
  if (event.target.files[0]) open(await createImageBitmap(event.target.files[0]));
});
element.querySelector(".clear").addEventListener("click", () => { hole.clearRect(0, 0, side, side); show(); });
element.querySelector(".take").addEventListener("click", async () => {
  const drawn = document.querySelector(`#${props.gallery} img`);
  if (drawn) open(await createImageBitmap(await (await fetch(drawn.src)).blob()));
});
canvas.picture = () => {
  if (!opened) return "";
  const whole = layer();
  whole.drawImage(base.canvas, 0, 0);
  whole.globalCompositeOperation = "destination-out";
  whole.drawImage(hole.canvas, 0, 0);
  return whole.canvas.toDataURL("image/png");
};

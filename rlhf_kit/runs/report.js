"use strict";
const curves = JSON.parse(document.getElementById("curves").textContent);

function formatNumber(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value), sign = value < 0 ? "−" : "";
  for (const [least, unit, letter] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [9999.5, 1e3, "k"]])
    if (size >= least) return sign + Number((size / unit).toPrecision(3)) + letter;
  if (size && size < 1e-3) {
    const [mantissa, exponent] = size.toExponential(2).split("e");
    return sign + Number(mantissa) + "e" + exponent.replace("+", "").replace("-", "−");
  }
  return sign + Number(size.toPrecision(4));
}

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - points[low - 1][0] < points[low][0] - step ? points[low - 1] : points[low];
}

// Pointing at one curve reads off every curve of the stage at that step.
function readOff(stage, step) {
  for (const panel of stage.querySelectorAll(".panel")) {
    const {x: [first, last], y: [low, high], series} = curves[panel.id];
    const cross = panel.querySelector(".cross");
    cross.hidden = step === null;
    if (step !== null) {
      cross.style.left = 100 * (step - first) / (last - first) + "%";
      cross.dataset.step = step;
    }
    const values = panel.querySelectorAll(".legend b"), dots = panel.querySelectorAll(".point");
    series.forEach((points, index) => {
      const [at, value] = step === null ? [null, null] : nearest(points, step);
      const inside = value !== null && value >= low && value <= high;
      values[index].textContent = step === null ? values[index].dataset.final : formatNumber(value);
      dots[index].hidden = !inside;
      if (inside) {
        dots[index].style.left = 100 * (at - first) / (last - first) + "%";
        dots[index].style.top = 100 * (high - value) / (high - low) + "%";
      }
    });
  }
}

for (const stage of document.querySelectorAll(".stage")) {
  const steps = [...new Set([...stage.querySelectorAll(".panel")]
    .flatMap(panel => curves[panel.id].series.flat().map(point => point[0])))].sort((a, b) => a - b);
  let current = steps.length - 1;
  for (const area of stage.querySelectorAll(".area")) {
    const panel = area.closest(".panel");
    area.addEventListener("pointermove", event => {
      const box = area.getBoundingClientRect(), [first, last] = curves[panel.id].x;
      const wanted = first + (last - first) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const step = nearest(steps.map(step => [step]), wanted)[0];
      current = steps.indexOf(step);
      readOff(stage, step);
    });
    area.addEventListener("pointerleave", () => readOff(stage, null));
    area.addEventListener("blur", () => readOff(stage, null));
    area.addEventListener("keydown", event => {
      const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!move) return;
      event.preventDefault();
      current = Math.min(steps.length - 1, Math.max(0, current + move));
      readOff(stage, steps[current]);
    });
  }
}

for (const browser of document.querySelectorAll(".credit")) {
  const slider = browser.querySelector("input"), shown = browser.querySelector(".shown");
  const templates = [...browser.querySelectorAll("template")], play = browser.querySelector(".play");
  if (!slider) continue;
  let timer = null;
  const show = index => {
    slider.value = index;
    browser.querySelector("output").textContent = "step " + templates[index].dataset.step;
    shown.replaceChildren(templates[index].content.cloneNode(true));
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const move = by => show(Math.min(templates.length - 1, Math.max(0, Number(slider.value) + by)));
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  browser.querySelector(".back").addEventListener("click", () => { stop(); move(-1); });
  browser.querySelector(".forward").addEventListener("click", () => { stop(); move(1); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === templates.length - 1) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => { move(1); if (Number(slider.value) === templates.length - 1) stop(); }, 900);
  });
}

// Bring the read-out of a token to the pointer; without a script it stands at the left of its line.
document.addEventListener("pointerover", event => {
  const token = event.target.closest?.(".hm-text > span");
  if (!token) return;
  const block = token.parentElement.getBoundingClientRect(), box = token.getClientRects()[0];
  const room = Math.max(0, block.width - 300);
  token.style.setProperty("--x", Math.min(room, Math.max(0, box.left - block.left)) + "px");
});

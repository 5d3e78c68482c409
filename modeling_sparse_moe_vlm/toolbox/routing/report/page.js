for (const group of document.querySelectorAll("[data-layers]")) {
  const buttons = group.querySelectorAll("button[data-layer]");
  const show = (layer) => {
    for (const part of group.querySelectorAll("[data-of-layer]")) part.hidden = part.dataset.ofLayer !== layer;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.layer === layer));
  };
  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.layer));
  if (buttons.length) show(buttons[0].dataset.layer);
}

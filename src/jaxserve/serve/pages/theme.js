// Runs before the first paint, so that a chosen theme never flashes in the other one's colours.
"use strict";
(() => {
  const KEY = "jaxserve.theme";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  const stored = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is switched off
    }
  };
  const keep = (theme) => {
    try {
      if (theme === null) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, theme);
    } catch {
      // the choice then lasts as long as the page
    }
  };
  const systems = () => (system.matches ? "dark" : "light");
  const shown = () => root.dataset.theme ?? systems();

  const given = stored();
  if (given === "dark" || given === "light") root.dataset.theme = given;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => {
      const other = shown() === "dark" ? "light" : "dark";
      button.setAttribute("aria-label", `Switch to the ${other} theme`);
      button.title = button.getAttribute("aria-label");
    };
    button.addEventListener("click", () => {
      const next = shown() === "dark" ? "light" : "dark";
      // the system's own choice is followed again, once it is what the user wants
      if (next === systems()) delete root.dataset.theme;
      else root.dataset.theme = next;
      keep(root.dataset.theme ?? null);
      name();
    });
    system.addEventListener("change", name);
    name();
  });
})();

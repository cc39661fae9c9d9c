"use strict";
const root = document.documentElement.dataset.root;
const find = id => document.getElementById(id);

// light and dark: as the system has it until the switch is used
const themeButton = find("site-theme-button"), system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const showTheme = () => themeButton.setAttribute("aria-pressed", isDark());
themeButton.addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("theme", theme) } catch (refused) { /* kept for this page alone */ }
  showTheme();
});
system.addEventListener("change", showTheme);
showTheme();

// the menu of a narrow window
const menuButton = find("site-menu-button"), menu = find("site-menu");
const openMenu = open => {
  menuButton.setAttribute("aria-expanded", open);
  menu.classList.toggle("open", open);
  if (open) menu.querySelector("[aria-current]")?.scrollIntoView({ block: "center" });
};
menuButton.addEventListener("click", () => openMenu(menuButton.getAttribute("aria-expanded") !== "true"));
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && menu.classList.contains("open")) { openMenu(false); menuButton.focus() }
});
const current = menu.querySelector("[aria-current]");
if (current && current.offsetTop > innerHeight - 120) menu.scrollTop = current.offsetTop - innerHeight / 3;

// a link into a folded part opens it
const reveal = () => {
  const target = location.hash && find(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let part = target.parentElement; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  target.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();

// what is wider than the page can be scrolled by keys, too
for (const part of document.querySelectorAll("pre, .table, .formula, figure")) if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;

// copy code
if (navigator.clipboard) for (const block of document.querySelectorAll("pre.code")) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => button.textContent = "Copy", 1500);
  });
  const frame = Object.assign(document.createElement("div"), { className: "frame" });
  block.replaceWith(frame);
  frame.append(block, button);
}

// the heading in view is marked in the list of contents
const inContents = new Map([...document.querySelectorAll(".contents a")].map(link => [decodeURIComponent(link.hash.slice(1)), link]));
if (inContents.size) {
  const marks = [...inContents.keys()].map(find).filter(Boolean);
  const mark = () => {
    const at = marks.filter(part => part.getBoundingClientRect().top < 120).pop();
    for (const [id, link] of inContents) link.classList.toggle("here", at?.id === id);
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (!waiting) requestAnimationFrame(() => { waiting = false; mark() });
    waiting = true;
  }, { passive: true });
  mark();
}

// search: the index is a script, fetched when it is first needed, so that it works from a folder, too
const dialog = find("site-search"), query = find("site-query"), results = find("site-results"), status = find("site-status");
let rows, selected = -1;
const loadIndex = () => new Promise((done, failed) => {
  if (window.siteIndex) return done();
  document.head.append(Object.assign(document.createElement("script"), { src: root + "assets/search.js", onload: done, onerror: failed }));
}).then(() => {
  rows ??= window.siteIndex.map(([address, page, heading, text, symbol]) =>
    ({ address, page, heading, text, symbol, low: { page: page.toLowerCase(), heading: heading.toLowerCase(), text: text.toLowerCase() } }));
});
const startsWord = (text, term) => {
  for (let at = text.indexOf(term); at >= 0; at = text.indexOf(term, at + 1)) if (!at || !/[\p{L}\p{N}]/u.test(text[at - 1])) return at;
  return -1;
};
const score = (row, terms) => {
  let sum = 0;
  for (const term of terms) {
    let worth = 0;
    if (row.low.heading === term) worth += row.symbol ? 60 : 40;
    else if (row.symbol && row.low.heading.endsWith("." + term)) worth += 45;
    if (startsWord(row.low.heading, term) >= 0) worth += 20;
    if (startsWord(row.low.page, term) >= 0) worth += 8;
    if (startsWord(row.low.text, term) >= 0) worth += 3 + Math.min(5, row.low.text.split(term).length - 1);
    else if (row.low.text.includes(term) || row.low.heading.includes(term)) worth += 1;
    if (!worth) return 0;
    sum += worth;
  }
  const phrase = terms.join(" ");
  if (terms.length > 1) sum += (row.low.heading.includes(phrase) ? 25 : 0) + (row.low.text.includes(phrase) ? 12 : 0);
  return sum;
};
const marked = (text, terms) => {
  const parts = document.createElement("span"), pattern = terms.map(term => term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
  for (const [i, part] of text.split(new RegExp(`(${pattern})`, "gi")).entries())
    parts.append(i % 2 ? Object.assign(document.createElement("mark"), { textContent: part }) : part);
  return parts;
};
const excerpt = (row, terms) => {
  const at = Math.max(0, Math.min(...terms.map(term => row.low.text.indexOf(term)).filter(place => place >= 0), row.text.length) - 60);
  return at >= row.text.length - 60 ? row.text.slice(0, 160) : (at ? "…" : "") + row.text.slice(at, at + 160) + (at + 160 < row.text.length ? "…" : "");
};
const select = number => {
  const options = [...results.children];
  selected = options.length ? (number + options.length) % options.length : -1;
  options.forEach((option, i) => option.setAttribute("aria-selected", i === selected));
  options[selected]?.scrollIntoView({ block: "nearest" });
  if (selected >= 0) query.setAttribute("aria-activedescendant", options[selected].id);
  else query.removeAttribute("aria-activedescendant");
};
const search = () => {
  const terms = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = terms.length && rows ? rows.map(row => [score(row, terms), row]).filter(([worth]) => worth)
    .sort((a, b) => b[0] - a[0]) : [];
  results.replaceChildren(...found.slice(0, 30).map(([, row], i) => {
    const option = Object.assign(document.createElement("li"), { id: `site-result-${i}`, role: "option" });
    const link = Object.assign(document.createElement("a"), { href: root + row.address, tabIndex: -1 });
    const title = Object.assign(document.createElement(row.symbol ? "code" : "strong"), {});
    title.append(marked(row.heading, terms));
    link.append(title, Object.assign(document.createElement("small"), { textContent: row.heading === row.page ? "" : row.page }),
      Object.assign(document.createElement("span"), { className: "excerpt" }));
    link.lastChild.append(marked(excerpt(row, terms), terms));
    link.addEventListener("click", () => dialog.close());
    option.append(link);
    return option;
  }));
  query.setAttribute("aria-expanded", found.length > 0);
  status.textContent = !terms.length ? "" : found.length > 30 ? `${found.length} places, the best 30` :
    found.length === 1 ? "1 place" : found.length ? `${found.length} places` : "Nothing found";
  select(0);
};
const openSearch = async () => {
  if (!dialog.open) dialog.showModal();
  query.focus();
  query.select();
  try { await loadIndex() } catch (failed) { status.textContent = "The index of the search could not be loaded"; return }
  search();
};
find("site-search-button").addEventListener("click", openSearch);
query.addEventListener("input", search);
query.addEventListener("keydown", event => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); select(selected + (event.key === "ArrowDown" ? 1 : -1)) }
  else if (event.key === "Enter" && selected >= 0) { event.preventDefault(); results.children[selected].querySelector("a").click() }
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close() });
document.addEventListener("keydown", event => {
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey && event.key === "/") { event.preventDefault(); openSearch() }
  if ((event.ctrlKey || event.metaKey) && event.key === "k") { event.preventDefault(); openSearch() }
});

// The jobs page. It polls the API for the jobs of the current view and updates the list in place, so that focus,
// selection and opened details stay. Texts of a job are set with textContent only, never as HTML.

const PAUSE = 1500, MAX_PAUSE = 30000, TIMEOUT = 10000; // milliseconds
const STATES = ["queued", "running", "succeeded", "failed", "cancelled"];

const $ = (selector, root = document) => root.querySelector(selector);
const { jobsUrl, loginUrl, pageUrl, job: singleJob } = $("main").dataset; // singleJob: the id, on the page of one job
const heading = $("h1"), list = $("#jobs"), live = $("#live"), problem = $("#problem"), pages = $("#pages");
const rows = new Map(); // job id -> { job, name, element, part }
let shown, timer, latest = 0, failures = 0, due = 0, skew = 0;

// ---- Texts
const capital = (words) => words.charAt(0).toUpperCase() + words.slice(1);
const shortName = (task) => capital(task.split(".").pop().replaceAll("_", " ").trim()) || task;
const fullTime = (iso) => (iso ? new Date(iso).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" }) : "not yet");
const explain = (status) => (status === 404 ? "There is no such job, or it is not yours." : status ? `The server answered with an error (${status}).` : "Cannot reach the server.");
const isActive = (job) => job.state === "queued" || job.state === "running";

function span(milliseconds) {
  const seconds = Math.floor(Math.max(0, milliseconds / 1000)) || 0;
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} days`;
}

function duration({ state, created_at, started_at, finished_at }, now) {
  if (state === "queued") return `waiting ${span(now - Date.parse(created_at))}`;
  if (!started_at) return "never ran";
  if (!finished_at) return `for ${span(now - Date.parse(started_at))}`;
  const took = Date.parse(finished_at) - Date.parse(started_at);
  return `took ${took < 9950 ? `${Math.max(0, took / 1000).toFixed(1)} s` : span(took)}`;
}

function note({ state, queue, progress, message }) {
  if (state === "queued") return message || `Waiting in the queue ${queue}`;
  if (state === "running" || state === "succeeded") return message;
  return [progress > 0 && `Stopped at ${progress}%`, message].filter(Boolean).join(" · ");
}

function outcome({ state, error, result }) {
  if (state === "succeeded" && typeof result !== "string") {
    const line = result === null ? "" : JSON.stringify(result, null, 1).replace(/\n */g, " ");
    return { line, all: JSON.stringify(result, null, 2), long: line.length > 90 };
  }
  const all = String((state === "succeeded" ? result : error) ?? "").trim(), lines = all.split("\n");
  return { line: all.startsWith("Traceback") ? lines.at(-1) : lines[0], all, long: all.length > 90 || lines.length > 1 };
}

// ---- Rows: write only what changed, and move the focus away from an element before it is hidden
function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

function show(node, visible) {
  if (!visible && node.contains(document.activeElement)) (node.closest(".job") ?? heading).focus({ preventScroll: true });
  node.hidden = !visible;
}

function addRow(job) {
  const element = $("#job").content.firstElementChild.cloneNode(true), name = job.label || shortName(job.task);
  const part = Object.fromEntries([...element.querySelectorAll("[data-part]")].map((node) => [node.dataset.part, node]));
  const row = { element, part, name };
  part.name.title = `${job.task}\nJob ${job.id}`;
  part.name.href = `${pageUrl}jobs/${job.id}/`;
  part.cancel.setAttribute("aria-label", `Cancel ${name}`);
  part.cancel.addEventListener("click", () => cancel(row));
  rows.set(job.id, row);
  return row;
}

function updateRow(row, job) { // returns the messages for screen readers
  const { element, part, name } = row, { line, all, long } = outcome(job), active = isActive(job);
  const changed = row.job && row.job.state !== job.state;
  const texts = { name, task: job.task, state: capital(job.state), percent: `${job.progress}%`, message: note(job) };
  Object.assign(texts, { short: long ? "" : line, summary: line.slice(0, 300), all }, changed && { error: "" });
  for (const key in texts) text(part[key], texts[key]);
  row.job = job;
  element.dataset.state = job.state;
  part.icon.setAttribute("href", `#icon-${job.state}`);
  part.bar.value = job.progress;
  part.when.dateTime = job.created_at;
  part.when.title = `Created ${fullTime(job.created_at)}\nStarted ${fullTime(job.started_at)}\nFinished ${fullTime(job.finished_at)}`;
  show(part.progress, active);
  show(part.long, long);
  show(part.cancel, active);
  return changed ? [`${name}: ${job.state}`] : [];
}

// ---- The list
function view() {
  const hash = new URLSearchParams(location.hash.slice(1)), state = hash.get("state");
  return { state: STATES.includes(state) ? state : "", cursor: hash.get("cursor") ?? "" };
}
const query = (view) => new URLSearchParams(Object.entries(view).filter(([, value]) => value));
const cursor = (url) => url && new URL(url).searchParams.get("cursor");

function render(wanted, { next, previous, results }) {
  const pageChanged = shown?.state === wanted.state && shown.cursor !== wanted.cursor, news = [];
  const kept = new Set(results.map((job) => job.id));
  for (const [id, { element }] of rows) {
    if (kept.has(id)) continue;
    if (element.contains(document.activeElement)) heading.focus({ preventScroll: true });
    element.remove();
    rows.delete(id);
  }
  results.forEach((job, index) => { // sorted newest first, so existing rows keep their order
    const row = rows.get(job.id) ?? addRow(job);
    news.push(...updateRow(row, job));
    if (list.children[index] !== row.element) list.insertBefore(row.element, list.children[index] ?? null);
  });
  if (news.length) $("#news").textContent = news.join(", ");
  show($("#empty"), !results.length && !wanted.state);
  show($("#no-match"), !results.length && wanted.state);
  text($("#no-match span"), wanted.state);

  const [newer, older] = pages.children;
  newer.href = `#${query({ ...wanted, cursor: cursor(previous) })}`;
  older.href = `#${query({ ...wanted, cursor: cursor(next) })}`;
  show(newer, previous);
  show(older, next);
  show(pages, previous || next);
  if (pageChanged) heading.focus();
  list.removeAttribute("aria-busy");
  shown = wanted;
}

function tick() { // update the texts that depend only on the clock
  const now = Date.now() + skew, left = due - Date.now();
  for (const { job, part } of rows.values()) {
    const age = now - Date.parse(job.created_at);
    text(part.when, age > 5000 ? `${span(age)} ago` : "just now");
    text(part.duration, duration(job, now));
  }
  text($("small", problem), left > 0 ? `Trying again in ${span(left + 999)}.` : "Trying now…");
}

// ---- The server
async function fetchJson(url, options) {
  try {
    const response = await fetch(url, { ...options, signal: AbortSignal.timeout(TIMEOUT) });
    return { status: response.status, headers: response.headers, data: await response.json() };
  } catch {
    return { status: 0, data: {} };
  }
}

const post = (url) => fetchJson(url, { method: "POST", headers: { "X-CSRFToken": $("[name=csrfmiddlewaretoken]").value } });

async function load() {
  clearTimeout(timer);
  const number = ++latest, wanted = view();
  const answer = await fetchJson(singleJob ? `${jobsUrl}${singleJob}/` : `${jobsUrl}?${query(wanted)}`), { status, headers } = answer;
  if (number !== latest) return; // a newer request was sent meanwhile
  const data = singleJob && status === 200 ? { results: [answer.data] } : answer.data;
  const back = new URLSearchParams({ next: location.pathname + location.hash });
  if (status === 401 || status === 403) return location.assign(`${loginUrl}?${back}`);
  const good = status === 200 && Array.isArray(data.results), atTop = good && !data.previous;
  // If there are no newer jobs, or the cursor is unknown, go to the first page, where new jobs appear.
  if (wanted.cursor && (atTop || status === 404)) return location.replace(`#${query({ state: wanted.state })}`);
  const offset = Date.parse(headers?.get("Date")) - Date.now();
  failures = good ? 0 : failures + 1;
  let pause = headers?.get("Retry-After") * 1000 || Math.min(MAX_PAUSE, PAUSE * 2 ** failures) * (0.75 + Math.random() / 4);
  if (good) {
    skew = Math.abs(offset) > 3000 ? offset : 0; // how far this computer's clock is behind
    pause = PAUSE;
    render(wanted, data);
    text($("time", live), new Date().toLocaleTimeString());
  }
  live.dataset.live = good;
  text($("span", live), good ? "Live, updated" : "Not live, last updated");
  text($("[role=alert]", problem), good ? "" : status === 429 ? "Too many requests." : explain(status));
  show(problem, !good);
  show(live, shown);
  due = Date.now() + pause;
  if (!document.hidden) timer = setTimeout(load, pause);
  tick();
}

async function cancel(row) {
  const { job, part } = row, focused = document.activeElement === part.cancel;
  part.cancel.disabled = true;
  text(part.error, "");
  const { status, data } = await post(`${jobsUrl}${encodeURIComponent(job.id)}/cancel/`);
  part.cancel.disabled = false;
  if (focused && document.activeElement === document.body) part.cancel.focus();
  if (status === 200) $("#news").textContent = updateRow(row, data).join();
  const error = status === 200 ? "" : (data.detail ?? explain(status));
  text(part.error, error);
  await load();
  text(part.error, error); // again, because load() clears it if the job has ended meanwhile
}

async function start(button) {
  button.disabled = true;
  const { status, data } = await post(button.dataset.url);
  button.disabled = false;
  if (document.activeElement === document.body) button.focus();
  text($("#start .error"), status === 202 ? "" : (data.detail ?? explain(status)));
  const { state, cursor } = view();
  if (status === 202 && (state || cursor)) location.hash = "#state="; // the view that shows the new job
  else await load();
}

function navigate() {
  for (const link of $("#filter")?.children ?? []) link.setAttribute("aria-current", link.hash === `#state=${view().state}`);
  list.setAttribute("aria-busy", true);
  load();
}

addEventListener("hashchange", navigate);
addEventListener("online", load);
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : load()));
$("button", problem).addEventListener("click", load);
$("#start")?.addEventListener("click", ({ target }) => target.dataset.url && start(target));
setInterval(tick, 1000);
navigate();

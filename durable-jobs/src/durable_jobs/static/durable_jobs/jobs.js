// The jobs page. It polls the API for the jobs of the current view and updates the list in place, so that focus,
// selection and opened details stay. Texts of a job are set with textContent only, never as HTML. A batch is one row,
// which links to the view of its jobs.

const PAUSE = 1500, MAX_PAUSE = 30000, TIMEOUT = 10000; // milliseconds
const FILTERS = ["queued", "running", "succeeded", "failed", "cancelled", "batches"];

const $ = (selector, root = document) => root.querySelector(selector);
// singleJob: the id, on the page of one job
const { jobsUrl, batchesUrl, loginUrl, job: singleJob } = $("main").dataset;
const pageUrl = singleJob ? "../../" : ""; // the list's: a job's page is jobs/<id>/ below it
const heading = $("h1"), list = $("#jobs"), live = $("#live"), problem = $("#problem"), pages = $("#pages");
const rows = new Map(); // id of a job or batch -> { job, name, element, part }
let shown, timer, latest = 0, failures = 0, due = 0, skew = 0;

// ---- Texts
const capital = (words) => words.charAt(0).toUpperCase() + words.slice(1);
const shortName = (task) => capital(task.split(".").pop().replaceAll("_", " ").trim()) || task;
const fullTime = (iso) => (iso ? new Date(iso).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" }) : "not yet");
const explain = (status) => (status === 404 ? "It does not exist, or it is not yours." : status ? `The server answered with an error (${status}).` : "Cannot reach the server.");
const isActive = (job) => job.state === "queued" || job.state === "running";

function span(milliseconds, round = Math.floor) {
  const seconds = round(Math.max(0, milliseconds / 1000)) || 0;
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${round(seconds / 60)} min`;
  return seconds < 172800 ? `${round(seconds / 3600)} h` : `${round(seconds / 86400)} days`;
}

function start({ state, due_at }, now) { // of a job that is not due yet
  const due = new Date(due_at), today = new Date(now), left = due - now;
  if (state !== "queued" || !due_at || left < 1) return "";
  const year = due.getFullYear() === today.getFullYear() ? undefined : "numeric";
  const day = due.toLocaleDateString([], { day: "numeric", month: "long", year });
  const on = due.toDateString() === today.toDateString() ? "" : `on ${day} `;
  const time = due.toLocaleTimeString([], { timeStyle: left < 60000 ? "medium" : "short" });
  return `Starts ${on}at ${time} (in ${span(left, Math.round)})`;
}

function why(job, now) {
  const texts = [start(job, now), job.reason].filter(Boolean);
  return texts.join(". ") || (job.state === "queued" ? `Waiting in the queue ${job.queue}` : "");
}

function duration({ state, created_at, due_at, started_at, finished_at }, now) {
  const since = Date.parse(due_at ?? created_at);
  if (state === "queued") return now < since ? "" : `waiting ${span(now - since)}`;
  if (!started_at) return "never ran";
  if (!finished_at) return `for ${span(now - Date.parse(started_at))}`;
  const took = Date.parse(finished_at) - Date.parse(started_at);
  return `took ${took < 9950 ? `${Math.max(0, took / 1000).toFixed(1)} s` : span(took)}`;
}

function asJob(item) { // of a batch: what its row shows, in the fields of a job
  if (!item.counts) return item;
  const { label, state, error, counts, created_at, ended_at } = item, { succeeded, failed, cancelled } = counts;
  const total = Object.values(counts).reduce((sum, count) => sum + count, 0), done = succeeded + failed + cancelled;
  const texts = [`${done.toLocaleString()} of ${total.toLocaleString()} done`];
  if (failed) texts.push(`${failed.toLocaleString()} failed`);
  if (cancelled) texts.push(`${cancelled.toLocaleString()} cancelled`);
  return {
    ...item, label: label || "Batch", task: `Batch of ${total.toLocaleString()} ${total === 1 ? "job" : "jobs"}`, result: null,
    state: state === "open" ? "running" : state, progress: Math.floor((100 * done) / (total || 1)),
    message: error ? "" : texts.join(", "), started_at: created_at, finished_at: ended_at,
  };
}

function note({ state, progress, message, counts }) {
  if (!["failed", "cancelled"].includes(state) || counts) return message;
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
  part.name.title = job.counts ? `Batch ${job.id}` : `${job.task}\nJob ${job.id}`;
  part.name.href = job.counts ? `#batch=${job.id}` : `${pageUrl}jobs/${job.id}/`;
  part.batch.href = `${pageUrl}#batch=${job.batch}`;
  show(part.batch, singleJob && job.batch);
  part.cancel.setAttribute("aria-label", `Cancel ${name}`);
  part.cancel.addEventListener("click", () => act(row, part.cancel, "cancel"));
  part.again.setAttribute("aria-label", `Run ${name} again`);
  part.again.addEventListener("click", () => act(row, part.again, "run_again"));
  rows.set(job.id, row);
  return row;
}

function follow(job) { // links to what started before and after a job, as [address, words]
  const before = job.follows_url && (job.follows_url.includes(batchesUrl)
    ? [`${pageUrl}#batch=${job.follows}`, "Previous batch"]
    : [`${pageUrl}jobs/${job.follows}/`, "Previous job"]);
  const after = (job.followed_by ?? []).map(({ id, label, task }) => [`${pageUrl}jobs/${id}/`, `Followed by ${label || shortName(task)}`]);
  return [before, ...after].filter(Boolean);
}

function link([address, words]) {
  const node = document.createElement("a");
  node.href = address;
  node.textContent = words;
  return node;
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
  const links = singleJob ? follow(job) : [];
  if (part.links.childElementCount !== links.length) part.links.replaceChildren(...links.map(link));
  show(part.progress, active);
  show(part.long, long);
  show(part.cancel, active);
  show(part.again, job.can_run_again && job.state !== "succeeded");
  return changed ? [`${name}: ${job.state}`] : [];
}

// ---- The list
function view() {
  const hash = new URLSearchParams(location.hash.slice(1)), state = hash.get("state");
  return { batch: hash.get("batch") ?? "", state: FILTERS.includes(state) ? state : "", cursor: hash.get("cursor") ?? "" };
}
const query = (view) => new URLSearchParams(Object.entries(view).filter(([, value]) => value));
const cursor = (url) => url && new URL(url).searchParams.get("cursor");

function render(wanted, { next, previous, results }) {
  const moved = shown && (shown.batch !== wanted.batch || (shown.state === wanted.state && shown.cursor !== wanted.cursor));
  const news = [], none = results.every((job) => job.id === wanted.batch);
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
  show($("#empty"), none && !wanted.state && !wanted.batch);
  show($("#no-match"), none && wanted.state);
  text($("#no-match span"), wanted.state === "batches" ? "batches" : `${wanted.state} jobs`);

  const [newer, older] = pages.children;
  newer.href = `#${query({ ...wanted, cursor: cursor(previous) })}`;
  older.href = `#${query({ ...wanted, cursor: cursor(next) })}`;
  show(newer, previous);
  show(older, next);
  show(pages, previous || next);
  if (moved) heading.focus();
  list.removeAttribute("aria-busy");
  shown = wanted;
}

function tick() { // update the texts that depend only on the clock
  const now = Date.now() + skew, left = due - Date.now();
  for (const { job, part } of rows.values()) {
    const age = now - Date.parse(job.created_at);
    text(part.when, age > 5000 ? `${span(age)} ago` : "just now");
    text(part.duration, duration(job, now));
    text(part.why, why(job, now));
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
  const number = ++latest, wanted = view(), urls = [];
  if (singleJob) urls.push(`${jobsUrl}${singleJob}/`);
  else if (wanted.batch) urls.push(`${batchesUrl}${encodeURIComponent(wanted.batch)}/`, `${jobsUrl}?${query(wanted)}`);
  else if (wanted.state === "batches") urls.push(`${batchesUrl}?${query({ cursor: wanted.cursor })}`);
  else urls.push(`${jobsUrl}?${query(wanted)}`);
  const answers = await Promise.all(urls.map((url) => fetchJson(url))), last = answers.at(-1).data;
  if (number !== latest) return; // a newer request was sent meanwhile
  const { status, headers } = answers.find(({ status }) => status !== 200) ?? answers[0];
  const first = singleJob || wanted.batch ? [answers[0].data] : []; // the job, or the batch above its jobs
  const data = status === 200 ? { ...last, results: [...first, ...(last.results ?? [])].map(asJob) } : {};
  const back = new URLSearchParams({ next: location.pathname + location.hash });
  if (status === 401 || status === 403) return location.assign(`${loginUrl}?${back}`);
  const good = status === 200 && Array.isArray(data.results), atTop = good && !data.previous;
  // If there are no newer jobs, or the cursor is unknown, go to the first page, where new jobs appear.
  if (wanted.cursor && (atTop || status === 404)) return location.replace(`#${query({ ...wanted, cursor: "" })}`);
  const offset = Date.parse(headers?.get("Date")) - Date.now();
  failures = good ? 0 : failures + 1;
  let pause = headers?.get("Retry-After") * 1000 || Math.min(MAX_PAUSE, PAUSE * 2 ** failures) * (0.75 + Math.random() / 4);
  if (good) {
    skew = Math.abs(offset) > 3000 ? offset : 0; // how far this computer's clock is behind
    pause = PAUSE * urls.length; // so that no view sends more requests than the others
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

async function act(row, button, action) {
  const { job, part } = row, focused = document.activeElement === button;
  button.disabled = true;
  text(part.error, "");
  const { status, data } = await post(`${job.counts ? batchesUrl : jobsUrl}${encodeURIComponent(job.id)}/${action}/`);
  const done = status === 200 || status === 202;
  button.disabled = false;
  if (focused && document.activeElement === document.body) button.focus();
  if (done && data.id === job.id) $("#news").textContent = updateRow(row, asJob(data)).join();
  const error = done ? "" : (data.detail ?? explain(status));
  text(part.error, error);
  await load();
  text(part.error, error); // again, because load() clears it if the job has ended meanwhile
}

async function enqueue(button) {
  button.disabled = true;
  const { status, data } = await post(button.dataset.url);
  button.disabled = false;
  if (document.activeElement === document.body) button.focus();
  text($("#start .error"), status === 202 ? "" : (data.detail ?? explain(status)));
  const hash = `#state=${data.counts ? "batches" : ""}`; // the view that shows the new job
  if (status === 202 && location.hash !== hash) location.hash = hash;
  else await load();
}

function navigate() {
  const { batch, state } = view(), inBatch = batch && `&batch=${encodeURIComponent(batch)}`;
  for (const link of document.querySelectorAll("#filter a, #no-match a")) {
    const [filter] = link.hash.split("&");
    link.hash = filter + inBatch;
    link.setAttribute("aria-current", filter === `#state=${state}`);
  }
  show($("#back"), batch);
  if (!singleJob) show($("#filter a:last-child"), !batch);
  list.setAttribute("aria-busy", true);
  load();
}

addEventListener("hashchange", navigate);
addEventListener("online", load);
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : load()));
$("button", problem).addEventListener("click", load);
$("#start")?.addEventListener("click", ({ target }) => target.dataset.url && enqueue(target));
setInterval(tick, 1000);
navigate();

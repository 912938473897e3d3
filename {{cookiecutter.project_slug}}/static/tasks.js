{% from "chosen.jinja" import worker_pool, has_flower, has_task_api with context %}
{% if has_task_api %}
// Start a task and show its status until it ends, even after a reload.
{% else %}
// Start a task.
{% endif %}
const find = (id) => document.getElementById(id);

async function send(method, url) {
  const token = document.querySelector("[name=csrfmiddlewaretoken]").value;
  const headers = { Accept: "application/json", "X-CSRFToken": token };
  const response = await fetch(url, { method, headers });
  if (response.ok) return response;
  const { detail } = await response.json().catch(() => ({}));
  throw Object.assign(new Error(detail ?? `The server answered ${response.status}.`), { status: response.status });
}
{% if has_task_api %}

const LABELS = {
  PENDING: "Waiting for a worker",
  STARTED: "Running",
  PROGRESS: "Running",
  RETRY: "Waiting to retry",
  SUCCESS: "Done",
  FAILURE: "Failed",
  REVOKED: "Cancelled",
};
const hasEnded = (state) => ["SUCCESS", "FAILURE", "REVOKED"].includes(state);
let timer;

function show({ state, progress, result, error }) {
  const ended = hasEnded(state);
  find("task").hidden = false;
  find("state").textContent = LABELS[state] ?? state;
  find("message").textContent = error ?? progress?.message ?? "";
  find("bar").hidden = ended;
  if (progress?.total) Object.assign(find("bar"), { max: progress.total, value: progress.done });
  else find("bar").removeAttribute("value"); // shows only that it is running
  find("result").hidden = state !== "SUCCESS";
  find("result").textContent = JSON.stringify(result, null, 2);
{% if has_flower %}
{% if worker_pool.revoke_options %}
  find("cancel").hidden = ended;
{% else %}
  find("cancel").hidden = !["PENDING", "RETRY"].includes(state); // a thread can't be stopped
{% endif %}
{% endif %}
  if (find("start")) find("start").disabled = !ended;
}

async function watch() {
  clearTimeout(timer);
  const url = sessionStorage.getItem("task");
  if (!url) return;
  try {
    const task = await (await send("GET", url)).json();
    show(task);
    if (!hasEnded(task.state)) timer = setTimeout(watch, 1000);
  } catch (error) {
    if (error.status === 404) {
      // It has expired, or somebody else has logged in.
      sessionStorage.removeItem("task");
      find("task").hidden = true;
      if (find("start")) find("start").disabled = false;
      return;
    }
    find("message").textContent = `${error.message} Trying again …`;
    timer = setTimeout(watch, 5000);
  }
}

find("start")?.addEventListener("click", async () => {
  find("start").disabled = true;
  try {
    const response = await send("POST", find("start").dataset.url);
    sessionStorage.setItem("task", response.headers.get("Location"));
    watch();
  } catch (error) {
    show({ state: "FAILURE", error: error.message });
  }
});
{% if has_flower %}
find("cancel").addEventListener("click", async () => {
  try {
    await send("DELETE", sessionStorage.getItem("task"));
    watch();
  } catch (error) {
    find("message").textContent = error.message;
  }
});
{% endif %}
watch();
{% else %}

find("start")?.addEventListener("click", async () => {
  find("start").disabled = true;
  try {
    await send("POST", find("start").dataset.url);
    find("message").textContent = "The report is on its way to your inbox.";
  } catch (error) {
    find("message").textContent = error.message;
  }
  find("start").disabled = false;
});
{% endif %}

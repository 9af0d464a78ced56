"""How the report page does with many videos, in a real browser: Chromium, headless, driven by its DevTools protocol.

    python benchmarks/report_page.py                        # 5,000 videos; needs /usr/bin/chromium or --browser
    python benchmarks/report_page.py --screenshots out/page # also pictures of every part, to look at

A folder with as many videos is made (a few real mp4 files under many names, some of them awkward), the report is
written as a job would write it, and opened from the disk. Scrolling and filtering are done by script in the page,
between animation frames; nothing is drawn by a GPU.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from reelbatch.device import processor_name
from reelbatch.jobs.manifest import JobRow, State, VideoRow
from reelbatch.jobs.report import write_report
from reelbatch.request import VideoRequest
from reelbatch.video import Video

RESULTS = Path(__file__).parent / "results"
KINDS = 8
"""Real files that the many names share."""
WORDS = re.findall(
    r"\S+",
    "a large small red green blue yellow white silver old quiet circle square triangle fox boat lantern river city "
    "mountain forest street window storm snow at night in the rain under stars moving left right slowly camera pans "
    "close-up wide shot golden hour reflections on water",
)
AWKWARD = (
    "<script>document.title='taken'</script> a fox </script><!-- & \"quotes\" 'single'",
    "ثعلب أحمر يركض عبر حقل مغطى بالثلج عند الفجر",
    "夕暮れの港で、小さな船がゆっくりと動く 🚤",
    "line one\nline two\u2028line three <img src=x onerror=\"document.title='taken'\">",
    "very " * 4000 + "long",
)
AWKWARD_NAMES = ("with space & #1?.mp4", "100% é \"quoted\" 'too'.mp4", "🚤 boat <b>.mp4", "a;b=c+d@e,[1].mp4")
ERRORS = (
    "OutOfMemoryError: decode of request '{id}' (1280×720, 129 frames) runs out of memory: 41.3 GiB wanted",
    "the file {file} could not be written: No space left on device",
    "RuntimeError: CUDA error: an illegal memory access was encountered\nat step {step}",
)


# -- the folder ------------------------------------------------------------------------------------


def make_folder(folder: Path, count: int) -> list[VideoRow]:
    """Real little videos under `count` names, and their rows: most done, some failed, a few not made yet."""
    rng = random.Random(0)
    real = [_video(folder / f".kind{i}.mp4", i) for i in range(KINDS)]
    clock = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)
    rows = []
    for number in range(count):
        prompt = AWKWARD[number] if number < len(AWKWARD) else " ".join(rng.choices(WORDS, k=rng.randint(6, 40)))
        file = AWKWARD_NAMES[number] if number < len(AWKWARD_NAMES) else f"{number:05}-seed{number}.mp4"
        if number % 16 == 0:
            clock += timedelta(seconds=rng.uniform(50, 70) + (5 * 3600 if number == count // 32 * 16 else 0))
        request = VideoRequest(
            prompt=prompt,
            seed=rng.getrandbits(64) if number % 7 == 0 else number,
            height=720,
            width=1280,
            frames=129,
            steps=50,
            guidance=6.0,
            fps=24,
            id=f"p{number:05}",
            tags=rng.sample(["night", "animals", "city", "slow", "vbench"], rng.randint(0, 3)),
        )
        state = State.DONE if number < len(AWKWARD) or rng.random() < 0.96 else State.FAILED
        state = State.WAITING if number >= count - count // 100 else state
        rows.append(_row(request, number, file, state, clock, rng))
        if state is State.DONE:
            os.link(real[number % KINDS], folder / file)
    return rows


def _video(path: Path, kind: int) -> Path:
    """A ball of noise that moves before a gradient: 320×180, 2 s."""
    rng = np.random.default_rng(kind)
    down, along = np.mgrid[0:180, 0:320].astype(np.float32)
    colors = rng.uniform(40, 215, (2, 3))
    ground = colors[0] + (colors[1] - colors[0]) * (along / 320)[..., None]
    frames = np.empty((48, 180, 320, 3), np.uint8)
    for i in range(48):
        x, y = 40 + 5 * i, 90 + 40 * np.sin(i / 6 + kind)
        ball = ((along - x) ** 2 + (down - y) ** 2 < 28**2)[..., None]
        frames[i] = np.where(ball, rng.integers(0, 255, ground.shape), ground)
    return Video(VideoRequest(prompt="benchmark", seed=kind, fps=24), frames).save(path)


def _row(request: VideoRequest, number: int, file: str, state: State, clock: datetime, rng: random.Random) -> VideoRow:
    ended = clock + timedelta(seconds=60 + number % 16 * 0.4)
    row = VideoRow(
        id=request.id,
        job=1 if number < len(AWKWARD) or number % 5 else 2,
        number=number,
        turn=number,
        request=request.model_dump(mode="json"),
        fingerprint=f"{rng.getrandbits(256):064x}",
        prompt=request.prompt,
        seed=str(request.seed),
        tags=list(request.tags),
        file=file,
        state=state,
        step=0,
        attempts=0 if state is State.WAITING else 1,
    )
    if state is State.WAITING:
        return row
    row.started, row.ended = (moment.isoformat(timespec="milliseconds") for moment in (clock, ended))
    if state is State.FAILED:
        row.error = ERRORS[number % 3].format(id=row.id, file=file, step=number % 50)
        return row
    row.sha256, row.frames_sha256 = f"{rng.getrandbits(256):064x}", f"{rng.getrandbits(256):064x}"
    row.size, row.batch, row.isolation, row.model_hash = 40_000 + number, 16, "exact", "0123456789abcdef"
    row.seconds = {"text": 0.4, "denoise": rng.uniform(48, 52), "decode": rng.uniform(4, 5), "write": rng.random()}
    row.versions = {"reelbatch": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"}
    return row


def make_jobs() -> list[JobRow]:
    settings = {"model": "hunyuanvideo-community/HunyuanVideo", "dtype": "bf16", "isolation": "exact"}
    command = ["job", "run", "prompts file.csv", "--out", "videos", "--steps", "50"]
    return [
        JobRow(number=number, created=f"2026-03-0{number}T08:59:00+00:00", settings={**settings, "command": command})
        for number in (1, 2)
    ]


# -- the browser -------------------------------------------------------------------------------------


class Page:
    """A page of a Chromium, driven over two pipes: messages of the DevTools protocol, each ended by a zero byte."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._left, self._number = to, back, b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Performance"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Raises `RuntimeError` where the browser refuses."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            found = os.read(self._back, 2**20)
            if not found:
                raise RuntimeError("the browser has gone")
            self._left += found
        message, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(message))

    def run(self, script: str) -> Any:
        """The value of an expression; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def window(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        end = time.monotonic() + 60
        while self.run("location.protocol + document.readyState") != "file:complete":
            if time.monotonic() > end:
                raise RuntimeError("the page does not load")
            time.sleep(0.02)
        self.run("new Promise(done => setTimeout(done, 500))")

    def press(self, key: str, code: int = 0) -> None:
        about = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": key} if len(key) == 1 else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def move(self, x: int, y: int) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def heap_mib(self) -> float:
        self.call("HeapProfiler.collectGarbage")
        return float(self.call("Runtime.getHeapUsage")["usedSize"]) / 2**20

    def shoot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def chromium(browser: str) -> Iterator[Page]:
    """A browser of its own, with an empty profile."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    options += "--disable-component-update --disable-sync --remote-debugging-pipe"
    read, write = _high(os.pipe()), _high(os.pipe())
    profile = tempfile.mkdtemp()

    def as_it_expects() -> None:
        os.dup2(read[0], 3)
        os.dup2(write[1], 4)

    process = subprocess.Popen(
        [browser, *options.split(), f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=as_it_expects,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read[0])
    os.close(write[1])
    try:
        yield Page(read[1], write[0])
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)


def _high(pipe: tuple[int, int]) -> tuple[int, int]:
    """Away from the numbers 3 and 4, which the browser's own ends are to have."""
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe]
    for end in pipe:
        os.close(end)
    return moved[0], moved[1]


# -- what is measured ----------------------------------------------------------------------------------

LOADED = """(() => {
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  const load = performance.getEntriesByType("navigation")[0];
  return {paint: paint.startTime, interactive: load.domInteractive, load: load.loadEventEnd};
})()"""

FILTER = """(async (name, value) => {
  const control = document.getElementById(name);
  const frame = () => new Promise(requestAnimationFrame);
  let last = null;
  const watcher = new MutationObserver(() => { last = performance.now(); });
  watcher.observe(document.getElementById("videos"),
                  {subtree: true, childList: true, characterData: true, attributes: true});
  await frame();
  last = null;
  const start = performance.now();
  control.value = value;
  control.dispatchEvent(new Event(control.tagName === "SELECT" ? "change" : "input", {bubbles: true}));
  let quiet = 0, seen = null;
  while (quiet < 12) {
    await frame();
    if (last !== null && last === seen) quiet++;
    else { quiet = 0; seen = last; }
    if (performance.now() - start > 5000) break;
  }
  watcher.disconnect();
  return {took: last - start, count: document.getElementById("count").textContent};
})"""
"""From the event to the last change of the document, after which it stands still for 12 frames."""

SCROLL = """(async (step, most) => {
  const frame = () => new Promise(requestAnimationFrame);
  scrollTo(0, 0);
  for (let i = 0; i < 20; i++) await frame();
  const gaps = [];
  let nodes = 0, opened = 0, empty = 0, before = await frame();
  const end = document.documentElement.scrollHeight - innerHeight;
  while (scrollY < end - 1 && gaps.length < most) {
    scrollBy(0, step);
    const now = await frame();
    gaps.push(now - before);
    before = now;
    if (gaps.length % 10 === 0) {
      nodes = Math.max(nodes, document.getElementsByTagName("*").length);
      opened = Math.max(opened, document.querySelectorAll("video[src]").length);
      if (!document.elementFromPoint(innerWidth / 2, innerHeight / 2)?.closest(".cell")) empty++;
    }
  }
  return {gaps, nodes, opened, empty, reached: scrollY, height: end};
})"""
"""`empty`: of the looks at every tenth frame, those that met no card in the window's middle (or the space between)."""


@dataclass(frozen=True)
class Scrolled:
    frames: int
    median: float
    longest: float
    slow: int
    nodes: int
    opened: int
    pixels: float

    @classmethod
    def of(cls, found: dict[str, Any]) -> Scrolled:
        gaps = found["gaps"]
        slow = sum(gap > 25 for gap in gaps)  # at 60 frames a second, one and a half
        longest = max(gaps)
        return cls(len(gaps), statistics.median(gaps), longest, slow, found["nodes"], found["opened"], found["reached"])


QUERIES = (("text", "fox"), ("text", "fox night"), ("text", "no such words at all"), ("text", ""), ("seed", "12"))
CHOICES = (("tag", "animals"), ("state", "failed"), ("sort", "prompt"), ("sort", "took"), ("sort", "number"))


def measure(page: Page, url: str) -> dict[str, Any]:
    page.window(1400, 900)
    page.open(url)  # once, so that the browser itself is warm
    loads = []
    for _ in range(5):
        page.open(url)
        loads.append(page.run(LOADED))
    found: dict[str, Any] = {name: statistics.median(load[name] for load in loads) for name in loads[0]}
    found["heap"] = page.heap_mib()
    found["nodes"] = page.run("document.getElementsByTagName('*').length")
    found["typed"], found["chosen"] = [], []
    for _ in range(3):
        for kind, cases in (("typed", QUERIES), ("chosen", CHOICES)):
            for name, value in cases:
                result = page.run(f"{FILTER}({json.dumps(name)}, {json.dumps(value)})")
                found[kind].append(result["took"])
                if name != "sort":
                    page.run(f"{FILTER}({json.dumps(name)}, '')")
    found["through"] = Scrolled.of(page.run(f"{SCROLL}(450, 1e9)"))
    found["slowly"] = Scrolled.of(page.run(f"{SCROLL}(40, 900)"))
    found["heap_after"] = page.heap_mib()
    page.run("new Promise(done => setTimeout(done, 1500))")
    found["ready"] = page.run("[...document.querySelectorAll('video[src]')].filter(one => one.readyState >= 1).length")
    found["open"] = page.run("document.querySelectorAll('video[src]').length")
    found["taken"] = page.run("document.title.includes('taken') && !document.title.includes('script')")
    return found


def check(page: Page, url: str) -> None:
    """That keys and pointer do what they should, and awkward names and prompts do no harm.

    Raises `AssertionError` naming what did not.
    """
    page.window(1400, 900)
    page.open(url)
    wait = "new Promise(done => setTimeout(done, {}))"

    def is_true(script: str, what: str) -> None:
        assert page.run(script), what

    page.run(wait.format(1500))
    urls = "[...document.querySelectorAll('.cell:not([hidden]) video')].slice(0, 4)"
    is_true(f"{urls}.every(one => one.readyState >= 1)", "files with awkward names play")
    is_true("!document.title.startsWith('taken')", "no prompt is run as a script")
    page.move(150, 420)
    page.run(wait.format(800))
    is_true("[...document.querySelectorAll('.cell video')].some(one => !one.paused)", "a video plays under the pointer")
    page.move(5, 5)
    page.run(wait.format(200))
    is_true("[...document.querySelectorAll('.cell video')].every(one => one.paused)", "and stops after it")
    page.run("document.querySelector('.card').focus()")
    for key, code, place in (("ArrowRight", 39, 2), ("ArrowDown", 40, 7), ("ArrowLeft", 37, 6), ("ArrowUp", 38, 1)):
        page.press(key, code)
        at = page.run("Number(document.activeElement.closest('.cell')?.getAttribute('aria-posinset'))")
        assert at == place, f"{key} goes to card {place}, and went to {at}"
    page.press("End", 35)
    page.run(wait.format(300))
    is_true(
        "document.activeElement.closest('.cell').ariaPosInSet === document.activeElement.closest('.cell')"
        ".ariaSetSize && document.activeElement.getBoundingClientRect().bottom <= innerHeight",
        "End shows the last",
    )
    page.press("Home", 36)
    page.run(wait.format(300))
    page.run("document.activeElement.click()")
    page.run(wait.format(700))
    is_true("document.querySelector('dialog').open && !document.querySelector('dialog video').paused", "a click opens")
    page.press(" ", 32)
    page.run(wait.format(200))
    is_true("document.querySelector('dialog video').paused", "space pauses")
    page.press("ArrowRight", 39)
    page.run(wait.format(500))
    is_true("document.querySelector('dialog .place').textContent.startsWith('2 of')", "an arrow shows the next")
    is_true("getComputedStyle(document.querySelector('dialog .prompt')).direction === 'rtl'", "Arabic runs to the left")
    page.press("Escape", 27)
    page.run(wait.format(300))
    is_true("!document.querySelector('dialog').open", "Esc closes")
    is_true("document.activeElement.closest('.cell')?.ariaPosInSet === '2'", "and the focus is on the video's card")
    is_true(
        "performance.getEntriesByType('resource').every(one => /^(file|data):/.test(one.name))", "nothing is remote"
    )


SHOTS = {
    "run": "document.querySelector('nav a[href=\"#run\"]').click()",
    "failures": "document.querySelector('nav a[href=\"#failures\"]').click()",
    "settings": "document.querySelector('nav a[href=\"#settings\"]').click()",
    "large": "document.querySelector('nav a[href=\"#videos\"]').click(); document.querySelector('.card').click()",
    "failed": "document.querySelector('dialog').close(); document.querySelector('[data-state=failed]').click()",
}


def shoot(page: Page, url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    looks: tuple[tuple[str, int, int, dict[str, bool]], ...] = (
        ("light", 1400, 900, {}),
        ("dark", 1400, 900, {"dark": True}),
        ("phone", 390, 844, {"phone": True}),
    )
    for look, width, height, options in looks:
        page.window(width, height, **options)
        page.open(url)
        page.run("new Promise(done => setTimeout(done, 1500))")
        page.shoot(folder / f"{look}-videos.png")
        for part, script in SHOTS.items():
            page.run(script)
            page.run("new Promise(done => setTimeout(done, 1200))")
            page.shoot(folder / f"{look}-{part}.png")


# -- the table -------------------------------------------------------------------------------------------


def table(count: int, found: dict[str, Any], browser: str) -> str:
    through, slowly = found["through"], found["slowly"]
    typed, chosen = found["typed"], found["chosen"]
    lines = [
        f"# The report page with {count:,} videos",
        "",
        f"{date.today()}, {processor_name()}, {os.cpu_count()} cores, {browser}, headless without a GPU, 1400×900, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the end",
        "",
        "| what | figure |",
        "|---|---|",
        f"| writing the report | {found['write']:.2f} s, {found['bytes'] / 2**20:.2f} MiB |",
        f"| first contentful paint, median of 5 | {found['paint']:.0f} ms |",
        f"| document read, gallery there | {found['interactive']:.0f} ms |",
        f"| load event | {found['load']:.0f} ms |",
        f"| typing in a filter to a settled document, median (longest) of {len(typed)}; 120 ms of it is waiting for "
        f"more letters | {statistics.median(typed):.0f} ({max(typed):.0f}) ms |",
        f"| choosing a filter or order to a settled document, median (longest) of {len(chosen)} | "
        f"{statistics.median(chosen):.0f} ({max(chosen):.0f}) ms |",
        _scroll_line("scrolled through to the end, half a window a frame", through),
        _scroll_line("scrolled slowly, 40 pixels a frame, so that videos are opened", slowly),
        f"| elements in the document: at the start, at most while scrolled | {found['nodes']:,}, "
        f"{max(through.nodes, slowly.nodes):,} |",
        f"| videos open at once, at most | {max(through.opened, slowly.opened)} |",
        f"| JavaScript heap: at first, after all of this | {found['heap']:.1f} MiB, {found['heap_after']:.1f} MiB |",
        "",
        "A figure of filtering holds the videos that are opened once the cards stand still. Slow frames are those of "
        "more than 25 ms. The same run checks keys, pointer, awkward file names and hostile prompts.",
    ]
    return "\n".join(lines) + "\n"


def _scroll_line(what: str, found: Scrolled) -> str:
    return (
        f"| {what} ({found.pixels:,.0f} pixels, {found.frames:,} frames) | median {found.median:.1f} ms, longest "
        f"{found.longest:.0f} ms, {found.slow:,} slow |"
    )


def main(
    count: Annotated[int, typer.Option(help="Videos.")] = 5000,
    browser: Annotated[str, typer.Option(help="A Chromium.")] = "/usr/bin/chromium",
    screenshots: Annotated[Path | None, typer.Option(help="A folder for pictures of the page.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the figures under results/.")] = True,
) -> None:
    told = subprocess.run([browser, "--version"], capture_output=True, text=True, check=True).stdout
    name = " ".join(told.split()[:2])
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "videos of a job")
        folder.mkdir()
        rows = make_folder(folder, count)
        start = time.perf_counter()
        path = write_report(folder, make_jobs(), rows)
        found: dict[str, Any] = {"write": time.perf_counter() - start, "bytes": path.stat().st_size}
        with chromium(browser) as page:
            check(page, path.as_uri())
            if screenshots:
                shoot(page, path.as_uri(), screenshots)
            found |= measure(page, path.as_uri())
    text = table(count, found, name)
    print(text)
    print(f"{found['ready']} of {found['open']} open videos are ready at the end")
    if keep:
        (RESULTS / "report_page.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

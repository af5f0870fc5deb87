"""`worldflux report`: one page about a run, which needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html import escape
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from helpers.html import ParsedPage, assert_well_made

from worldflux.cli.main import main
from worldflux.cli.report.animations import Film, animated
from worldflux.cli.runs import Evaluation, RunConfig, read_evaluations, write_evaluations
from worldflux.errors import ConfigurationError
from worldflux.locks import using
from worldflux.training import ReplayBuffer

MODEL = ["--set", "units=8", "--set", "hidden_dim=8", "--set", "deter_dim=16", "--set", "cnn_depth=2"]
TINY = [*MODEL, "--batch-size", "2", "--seq-len", "6", "--learning-starts", "16", "--train-ratio", "4"]
SHORT = ["--steps", "120", "--eval-interval", "60", "--eval-episodes", "2", "--buffer-size", "300"]


class Lamp(gym.Env[Any, Any]):
    """Becomes brighter with every step, which it shows. Episodes have 55 steps; the reward is the action."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.seen(), float(action), False, self.t == 55, {}

    def seen(self) -> Any:
        return np.array([self.t / 55, self.t % 2], np.float32)

    def render(self) -> Any:
        return np.full((32, 48, 3), 4 * self.t, np.uint8)


class Screen(Lamp):
    """A lamp that shows an image."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.observation_space = gym.spaces.Box(0, 255, (48, 48, 3), np.uint8)

    def seen(self) -> Any:
        return np.full((48, 48, 3), 4 * self.t, np.uint8)


class Broken(Lamp):
    """A lamp whose pictures cannot be made."""

    def render(self) -> Any:
        raise OSError("no <display>")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two seeds."""
    directory = tmp_path_factory.mktemp("seeds") / "lamp & co"
    for seed in ("3", "4"):
        run = str(directory / f"seed-{seed}")
        assert main(["train", "dreamerv3:tiny", f"{__name__}:Lamp", *TINY, *SHORT, "--seed", seed, "--run", run]) == 0
    return directory


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def reported(*args: object) -> ParsedPage:
    assert main(["report", *map(str, args)]) == 0
    page = ParsedPage(Path("report.html").read_text(encoding="utf-8"))
    assert_well_made(page)
    return page


def missing(page: ParsedPage) -> list[str]:
    return [text.removeprefix("Not shown: ") for text in page.texts["p"] if text.startswith("Not shown: ")]


def by_hand(task: str = "CartPole-v1", **settings: Any) -> Path:
    """The directory of a run that has begun and saved nothing."""
    directory = Path("run")
    directory.mkdir()
    settings = {"seed": 1, "steps": 100, **settings}
    RunConfig("train", "dreamerv3:tiny", task, settings, started="2026-01-02 03:04:05 +0000").write(directory)
    return directory


def test_a_run_is_shown_as_a_whole(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = reported(seeds / "seed-3")
    out, err = capsys.readouterr()
    assert out == "report.html\n"
    assert page.texts["h1"] == [f"DreamerV3 (dreamerv3:tiny) in {__name__}:Lamp"]
    assert page.texts["h2"] == [
        *("Learning curve", "Film", "Imagined and real", "Losses", "Health"),
        *("Evaluations", "Settings", "Code and machine", "Commands"),
    ]
    assert {"Over time", "Errors", "Rewards", "Total loss", "Actor", "Gradient norm"} <= set(page.texts["h3"])
    assert len(missing(page)) <= 1 and err.count("not shown") == len(missing(page))  # health, in a run this short

    rows = read_evaluations(seeds / "seed-3" / "evaluations.csv")
    texts = page.texts["dd"]
    assert f"{rows[-1].score:.4g}± {rows[-1].std:.3g} over 2 episodes" in texts
    best = max(rows, key=lambda row: row.score)
    assert f"{best.score:.4g}step {best.step}" in texts
    assert "120of 120 environment steps" in texts
    cells = " ".join(page.texts["tr"])
    for row in rows:
        assert f"{row.score:.4g}{row.std:.3g}552" in "".join(cells.split())

    config = RunConfig.read(seeds / "seed-3")
    assert config.command in page.texts["code"]
    assert "units=8 hidden_dim=8 deter_dim=16 cnn_depth=2" in page.texts["td"]
    assert config.versions["torch"] in page.texts["td"] and config.machine["cpu"] in page.texts["td"]
    marked = [row for (name, attributes), row in zip_rows(page) if attributes.get("class") == "marked"]
    assert "seed3" in marked and "n_envs1" not in marked

    kinds = [kind for kind, _ in page.images()]
    assert set(kinds) == {"image/svg+xml", "image/webp", "image/png"} and kinds.count("image/webp") == 1
    for kind, data in page.images():
        if kind == "image/svg+xml":
            assert ElementTree.fromstring(data).tag.endswith("svg")
        else:
            assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None


def zip_rows(page: ParsedPage) -> list[tuple[tuple[str, dict[str, str]], str]]:
    rows = [element for element in page.elements if element[0] == "tr"]
    return list(zip(rows, page.texts["tr"], strict=True))


def test_the_film_shows_the_episode_that_the_caption_scores(seeds: Path) -> None:
    page = reported(seeds / "seed-3", "--no-imagination", "--seed", "5", "--episodes", "2")
    (data,) = [data for kind, data in page.images() if kind == "image/webp"]
    made, animation = cv2.imdecodeanimation(np.frombuffer(data, np.uint8))
    assert made and sum(animation.durations) == 2 * 56 * 50  # with the last observation of both episodes
    ends = np.cumsum(animation.durations)  # the encoder joins frames that hardly differ
    for time in (0, 20, 55, 56, 100):
        shown = animation.frames[int(np.searchsorted(ends, 50 * time, side="right"))]
        assert abs(float(shown.mean()) - 4 * (time % 56)) < 10
    assert main(["eval", str(seeds / "seed-3"), "--episodes", "2", "--seed", "5", "--json"]) == 0
    (caption,) = [text for text in page.texts["figcaption"] if text.startswith("The best agent, after")]
    assert caption.endswith("in 55, 55 steps.")


def test_several_seeds_share_a_page(seeds: Path) -> None:
    page = reported(seeds, "--no-imagination")
    assert [title for title in page.texts["h3"] if title.startswith("Seed")] == ["Seed 3", "Seed 4"]
    scores = [[row.score for row in read_evaluations(seeds / f"seed-{seed}" / "evaluations.csv")] for seed in (3, 4)]
    mean, std = np.mean([each[-1] for each in scores]), np.std([each[-1] for each in scores], ddof=1)
    assert any(text.startswith(f"{mean:.4g}mean of 2 seeds, std {std:.3g}") for text in page.texts["dd"])
    assert "3, 4" in page.texts["dd"]
    means = [text for text in page.texts["td"] if text.startswith(f"{np.mean([each[0] for each in scores]):.4g} ± ")]
    assert means and len(page.texts["code"]) == 3
    assert page.texts["code"][-1] == f"worldflux reproduce '{seeds}'"
    assert [kind for kind, _ in page.images()].count("image/webp") == 2


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    page = reported(by_hand("no_such_module:Lamp"))
    texts = missing(page)
    assert [text.partition(".")[0].removeprefix(f"{Path.cwd()}/") for text in texts] == [
        "There are no scores yet",
        "run has no agent yet",
        "run has no agent yet",
        "No losses have been logged yet",
        "There are no health metrics yet",
        "There are no evaluations yet, or --eval-interval 0 has disabled them",
    ]
    assert "Started 2026-01-02 03:04:05; stopped before its first checkpoint." in page.texts["p"]
    assert capsys.readouterr().err.count("not shown: ") == 6


def test_every_text_is_escaped() -> None:
    name = "<script>alert(1)</script>&\"'"
    run = by_hand(name, set=["a=</table><img src=http://a.example/x>"])
    write_evaluations(run / "evaluations.csv", [Evaluation(50, 1.5, 0.5, 9.0, 2, 3.0, 1)])
    page = reported(run)
    assert page.texts["h1"] == [f"DreamerV3 (dreamerv3:tiny) in {name}"]
    assert "a=</table><img src=http://a.example/x>" in page.texts["td"]
    assert {"50of 100 environment steps", "3 s"} <= set(page.texts["dd"])  # from the evaluation, without a log


def test_a_run_in_progress_says_so() -> None:
    run = by_hand()
    with using(run):
        page = reported(run, "--no-film", "--no-imagination", "--no-reference")
    assert page.texts["p"][0] == "Started 2026-01-02 03:04:05; still in progress."
    assert page.texts["h2"][:2] == ["Learning curve", "Losses"]


def test_without_matplotlib_the_rest_is_shown(seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    page = reported(seeds / "seed-3")
    texts = missing(page)
    assert sum("need matplotlib" in text for text in texts) == 3 and not any(
        "ModuleNotFoundError" in text for text in texts
    )
    assert [kind for kind, _ in page.images()] == ["image/webp", "image/png"]  # the film


def test_an_environment_that_cannot_be_filmed_says_why(seeds: Path) -> None:
    shutil.copytree(seeds / "seed-3", "run")
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps({**config, "task": f"{__name__}:Broken"}))
    assert "OSError: no <display>" in missing(reported("run", "--no-imagination"))


@pytest.mark.parametrize("name", ["evaluations.csv", "logs/progress.csv"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(name: str, seeds: Path) -> None:
    shutil.copytree(seeds / "seed-3", "run")
    Path("run", name).write_bytes(b"step,\xff\n1,2\n")
    page = reported("run", "--no-film", "--no-imagination")
    assert any(f"{name} is not a " in text for text in missing(page))
    assert {"Learning curve", "Losses", "Settings", "Commands"} <= set(page.texts["h2"])
    assert page.images()  # of the other file


def test_steps_that_are_no_numbers_are_left_out(seeds: Path) -> None:
    shutil.copytree(seeds / "seed-3", "run")
    with Path("run/logs/progress.csv").open("a") as file:
        columns = Path("run/logs/progress.csv").read_text().partition("\n")[0].split(",")
        for step in ("nan", "inf", "many"):
            file.write(",".join(step if name == "time/total_timesteps" else "1" for name in columns) + "\n")
    assert missing(reported("run", "--no-film", "--no-imagination")) == missing(
        reported(str(seeds / "seed-3"), "--no-film", "--no-imagination")
    )


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": {"steps": "many"}},
        {"settings": {"env_kwargs": [1]}},
        {"settings": {"no_such": 1}},
        {"machine": {"device": 1}},
        {"resumed": ["again"]},
        {"resumed": [{"step": 3}]},
    ],
)
def test_a_damaged_configuration_is_one_line(damage: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    path = Path("run/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    for command in (["report", "run"], ["plot", "run"], ["reproduce", "run"]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and str(path) in err


def test_images_are_compared_with_their_predictions() -> None:
    args = ["train", "dreamerv3:tiny", f"{__name__}:Screen", *TINY, "--steps", "60", "--eval-interval", "0"]
    assert main([*args, "--buffer-size", "300", "--seed", "0", "--run", "run"]) == 0
    page = reported("run", "--no-film")
    assert {"Film", "Images", "Errors"} <= set(page.texts["h3"])
    data = next(data for kind, data in page.images() if kind == "image/webp")
    made, animation = cv2.imdecodeanimation(np.frombuffer(data, np.uint8))
    assert made and sum(animation.durations) == 50 * 100
    assert any(text.startswith("obs") for text in page.texts["tr"])


def test_a_model_of_recorded_data_has_losses_instead_of_scores() -> None:
    rng, buffer = np.random.default_rng(0), ReplayBuffer(900, (3,), 2)
    for _ in range(10):
        actions = np.eye(2, dtype=np.float32)[rng.integers(2, size=60)]
        obs, ends = rng.normal(size=(61, 3)).astype(np.float32), np.arange(60) == 59
        buffer.add_episode(obs, actions, rng.normal(size=60).astype(np.float32), ends)
    buffer.save("data.npz")
    options = ["--log-interval", "4", "--eval-interval", "6", "--batch-size", "2", "--seq-len", "4"]
    args = [*MODEL[:6], "--set", "action_type=discrete", "--steps", "12", *options, "--run", "run"]
    assert main(["train-offline", "dreamerv3:tiny", "data.npz", *args]) == 0
    page = reported("run", "--no-imagination")
    assert page.texts["h1"] == ["DreamerV3 (dreamerv3:tiny) on data of data.npz"]
    assert page.texts["h2"] == ["Losses", "Evaluations", "Settings", "Code and machine", "Commands"]
    assert missing(page) == []
    steps = [text for text in page.texts["tr"] if re.match(r"(6|12)\d+\.", text)]
    assert len(steps) == 2 and "12of 12 gradient steps" in page.texts["dd"]


def test_films_are_thinned_out_and_stay_small() -> None:
    film = Film(fps=50)
    for number in range(3000):
        film.add(np.full((40, 640, 3), number % 200, np.uint8))
    picture = film.picture(100_000, "a film")
    _, animation = cv2.imdecodeanimation(np.frombuffer(picture.data, np.uint8))
    assert len(animation.frames) <= 300 and animation.frames[0].shape[:2] == (20, 320)
    assert sum(animation.durations) == pytest.approx(3000 / 50 * 1000, rel=0.02)  # as long as the episodes
    with pytest.raises(ConfigurationError, match="larger than 10 bytes"):
        animated([np.zeros((8, 8, 3), np.uint8)] * 3, 0.1, 10, "a film")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "There is no run in nowhere. Pass a directory that worldflux train has written."),
        (["run", "-o", "report.pdf"], "report.pdf cannot be written, expected an .html in an existing directory."),
        (["run", "-o", "gone/report.html"], "gone/report.html cannot be written"),
        (["run", "--episodes", "0"], "episodes is 0"),
        (
            ["."],
            ". has runs that differ in more than their seeds: dreamerv3:tiny in Acrobot-v1; dreamerv3:tiny in Cart",
        ),
    ],
)
def test_what_cannot_be_reported_is_said(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    Path("another").mkdir()
    RunConfig("train", "dreamerv3:tiny", "Acrobot-v1", {"seed": 0}).write(Path("another"))
    assert main(["report", *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and message in err
    assert not list(Path().glob("*.html"))


# --- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

HOST = """<!DOCTYPE html><title>-</title>
<iframe style="width: 1200px; height: 900px; border: 0" srcdoc="PAGE"></iframe>
<iframe style="width: 400px; height: 900px; border: 0" srcdoc="PAGE"></iframe>
<script>
function measured(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  const shown = name => view.getComputedStyle(page.querySelector(name)).display;
  const requests = view.performance.getEntriesByType("resource").map(entry => entry.name);
  const images = [...page.images];
  const before = [shown(".moving"), shown(".still")];
  page.querySelector(".stop input").click();
  return {
    images: images.length,
    broken: images.filter(image => !image.complete || image.naturalWidth * image.naturalHeight === 0).length,
    requests: requests.filter(name => !name.startsWith("data:")),
    width: view.innerWidth,
    overflow: page.documentElement.scrollWidth - view.innerWidth,
    before: before,
    stopped: [shown(".moving"), shown(".still")],
  };
}
onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(measured)); };
</script>
"""
"""Shows the page, as it is, on a desktop and on a phone, and measures it."""


def browse(page: Path, *options: str) -> str:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=5000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)")
def test_a_browser_shows_it_on_a_desktop_and_on_a_phone(seeds: Path, tmp_path: Path) -> None:
    reported(seeds, "--no-imagination")
    text = Path("report.html").read_text(encoding="utf-8")
    Path("host.html").write_text(HOST.replace("PAGE", escape(text)), encoding="utf-8")
    dumped = browse(tmp_path / "host.html", "--window-size=1300,2000", "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dumped)
    assert title is not None
    for width, found in zip((1200, 400), json.loads(title[1]), strict=True):
        assert found["images"] == len(ParsedPage(text).all("img")) > 10
        assert (found["broken"], found["requests"], found["width"]) == (0, [], width)
        assert found["overflow"] <= 0, width
        assert (found["before"], found["stopped"]) == (["block", "none"], ["none", "block"])
    browse(tmp_path / "report.html", "--window-size=1200,2000", f"--screenshot={tmp_path / 'shot.png'}")
    shot = cv2.imread(str(tmp_path / "shot.png"))
    assert shot.shape == (2000, 1200, 3)
    assert shot[:80].std() > 5 and len(np.unique(shot.reshape(-1, 3), axis=0)) > 100  # text, and coloured curves

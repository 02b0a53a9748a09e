"""The pages of the reports in a browser: charts, tables, narrow and dark screens."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from pcagpt.json_files import read_json
from pcagpt.report import write_sweep_report
from pcagpt.report.page import write_experiment_pages
from pcagpt.report.read import read_row
from pcagpt.report.text import with_interval
from pcagpt.rows import read_sweep

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

PUBLISHED = Path(__file__).parent.parent / "checkpoints" / "published"
PROGRAMS = ("chromium", "chromedriver")
SCREENS = {"wide": (1400, "light"), "narrow": (400, "light"), "dark": (1400, "dark")}
POINTS = "[data-figure='{}'] g.mark-symbol.role-mark path"
# What a reader could load from elsewhere, and what the page writes to the console.
LOGS = {"browser": "ALL", "performance": "ALL"}
SAMPLES = [
    {"prompt": "The people", "seed": 1, "temperature": 0.8}
    | {"texts": {"D": "<b>one\n", "A": "two"}}
]


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """Without a browser, CI fails; elsewhere these tests are left out."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        said = f"no {' and '.join(missing)}: apt-get install chromium chromium-driver"
        assert "CI" not in os.environ, said
        pytest.skip(said)


SMOLLM2 = read_sweep(PUBLISHED / "smollm2_135m" / "val" / "sweep.json")


def of_smollm2(method, rank, bits=0):
    """A row of the published sweep."""
    recipe = {"method": method, "bands": 1, "rank": rank, "bits": bits}
    return next(
        row
        for row in SMOLLM2["rows"]
        if recipe.items() <= dataclasses.asdict(row).items()
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{kind: page} of a sweep and of an experiment."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("sweep", "experiment")}
    published = PUBLISHED / "gpt2_small_wikipedia"
    results = read_json(published / "results.json", "")
    rows = [read_row(published / row["folder"]) | row for row in results["rows"]]
    for number, row in enumerate(rows):  # These are older.
        row["val_loss_by_decile"] = 10 * [3.0]
        row["added_loss_by_decile"] = [number * n / 100 for n in range(10)]
    results |= {"rows": rows, "samples": SAMPLES}
    results["spectrum"] |= {"singular_values": [3.0, 2.0, 1.0]}
    return {
        "sweep": write_sweep_report(folders["sweep"], SMOLLM2 | {"samples": SAMPLES}),
        "experiment": write_experiment_pages(folders["experiment"], results),
    }


@contextlib.contextmanager
def browser(page, screen="wide"):
    """A browser that shows a page, when all its charts are drawn."""
    width, scheme = SCREENS[screen]
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", LOGS)
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(page.as_uri())
        wait = WebDriverWait(driver, 30)
        wait.until(lambda _: len(charts(driver)) == len(boxes(driver)) > 0)
        yield driver
    finally:
        driver.quit()


def boxes(driver):
    return driver.find_elements(By.CSS_SELECTOR, "[data-figure] > div")


def charts(driver):
    return driver.find_elements(By.CSS_SELECTOR, "[data-figure] svg.marks")


def points(driver, figure):
    return driver.find_elements(By.CSS_SELECTOR, POINTS.format(figure))


def visible(driver, figure):
    """Points that a reader sees; a second axis has transparent ones."""
    return [p for p in points(driver, figure) if p.get_attribute("opacity") != "0"]


def until(driver, condition):
    WebDriverWait(driver, 10).until(lambda _: condition())


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("kind", ["sweep", "experiment"])
def test_charts_are_drawn_without_a_word_in_the_console_or_a_request(
    kind, screen, pages
):
    width, _ = SCREENS[screen]
    with browser(pages[kind], screen) as driver:
        assert driver.get_log("browser") == []
        sent = [
            json.loads(e["message"])["message"] for e in driver.get_log("performance")
        ]
        asked = [
            event["params"]["request"]["url"]
            for event in sent
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        figures = {"sweep": ["pareto", "decile", "numbers"]}
        for figure in figures.get(kind, ["size", "loss", "decile", "spectrum"]):
            assert len(visible(driver, figure)) > 2
        # Nothing is wider than the screen; on a narrow one, panels stack.
        assert driver.execute_script("return document.body.scrollWidth") <= width
        places = [chart.rect for chart in charts(driver)]
        assert all(p["width"] > 250 and p["x"] + p["width"] <= width for p in places)
        if screen == "narrow":
            assert len({round(place["x"]) for place in places}) == 1
        dark = "return getComputedStyle(document.body).backgroundColor"
        channels = driver.execute_script(dark).strip("rgb()").split(",")
        assert (int(channels[0]) < 64) == (screen == "dark")


def test_a_tooltip_has_the_value_and_its_interval(pages):
    with browser(pages["sweep"]) as driver:
        (place,) = driver.find_elements(By.CSS_SELECTOR, "[data-figure='pareto']")
        driver.execute_script("arguments[0].scrollIntoView()", place)
        labels = [p.get_attribute("aria-label") for p in visible(driver, "pareto")]
        number = next(n for n, label in enumerate(labels) if "coded, k=256" in label)
        point = visible(driver, "pareto")[number]
        webdriver.ActionChains(driver).move_to_element(point).perform()
        (tip,) = driver.find_elements(By.ID, "vg-tooltip-element")
        until(driver, lambda: "visible" in tip.get_attribute("class"))
        row = of_smollm2("coded", 256)
        added = with_interval(row.added_loss, row.added_loss_interval)
        for text in ("coded, k=256", f"{row.bytes:,} bytes", "3.58", added):
            assert text in tip.text


def test_a_click_on_the_legend_hides_and_shows_again(pages):
    with browser(pages["sweep"]) as driver:
        before = len(visible(driver, "pareto"))
        entry = driver.find_element(
            By.XPATH, "//*[@data-figure='pareto']//*[text()='svd']"
        )
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", entry)
        entry.click()
        until(driver, lambda: len(visible(driver, "pareto")) == before - 4)
        entry.click()
        until(driver, lambda: len(visible(driver, "pareto")) == before)


@pytest.mark.parametrize("with_control", [False, True])
def test_the_wheel_zooms_with_control_and_scrolls_without(with_control, pages):
    with browser(pages["sweep"]) as driver:
        place = driver.find_element(By.CSS_SELECTOR, "[data-figure='pareto'] .marks")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)

        def labels():
            return [text.text for text in place.find_elements(By.TAG_NAME, "text")]

        before = labels()
        rect = driver.execute_script(
            "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y]", place
        )
        turn = {"type": "mouseWheel", "x": rect[0] + 300, "y": rect[1] + 200}
        turn |= {"deltaX": 0, "deltaY": -200, "modifiers": 2 if with_control else 0}
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", turn)
        if with_control:
            until(driver, lambda: labels() != before)
        else:
            driver.execute_async_script("setTimeout(arguments[0], 300)")
            assert labels() == before


def column(table, number):
    rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
    cells = [row.find_elements(By.TAG_NAME, "td")[number] for row in rows]
    return [cell.text for cell in cells if cell.is_displayed()]


def test_a_table_sorts_filters_and_is_downloaded_as_csv(pages):
    with browser(pages["sweep"]) as driver:
        table = driver.find_element(By.CSS_SELECTOR, "#all-tables ~ .scroll table")
        tools = driver.find_element(By.CSS_SELECTOR, "#all-tables ~ .tools")
        heads = table.find_elements(By.TAG_NAME, "th")
        (added,) = (n for n, head in enumerate(heads) if head.text == "Added")
        assert heads[added].get_attribute("title").startswith("loss with this table")
        for order in ("ascending", "descending"):
            heads[added].click()
            assert heads[added].get_attribute("aria-sort") == order
            shown = [text.split(" ±")[0] for text in column(table, added)]
            numbers = [float(text.replace("−", "-")) for text in shown]
            assert numbers == sorted(numbers, reverse=order == "descending")
        tools.find_element(By.TAG_NAME, "input").send_keys("GPTQ int4")
        assert column(table, 0) == ["D's table, GPTQ, int4"]
        driver.execute_script(
            "URL.createObjectURL = (blob) => { window.made = blob; return '#'; }"
        )
        tools.find_element(By.TAG_NAME, "button").click()
        script = "window.made.text().then(arguments[0])"
        lines = driver.execute_async_script(script).split("\r\n")
        names, cells = (line.strip('"').split('","') for line in lines[:2])
        values = dict(zip(names, cells, strict=True))
        assert values["Table"] == "D's table, GPTQ, int4"
        assert values["Bytes"] == "15925248" and lines[2:] == [""]
        row = of_smollm2("gptq", 0, bits=4)
        added = with_interval(row.added_loss, row.added_loss_interval)
        assert f"{values['Added']} ± {values['Added ±']}" == added


def test_samples_stand_side_by_side_as_text(pages):
    for kind, page in pages.items():
        with browser(page) as driver:
            found = driver.find_elements(By.CSS_SELECTOR, ".samples > div")
            assert [box.text for box in found] == ["D\n<b>one", "A\ntwo"], kind
            assert len({box.rect["y"] for box in found}) == 1

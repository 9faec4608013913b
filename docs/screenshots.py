"""Take the screenshots of docs/flows.md from a `tandem up` that has a finished two-stage run.

python docs/screenshots.py --url http://127.0.0.1:4200 --browser /usr/bin/chromium
"""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import ViewportSize, sync_playwright
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

IMAGES = Path(__file__).parent / "images"


def newest_run(name: str) -> tuple[str, str]:
    """The ids of the newest two-stage run of a name, or of any, and of its page."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["two-stage"])),
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])) if name else None,
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[runs[0].id]))
        )
    return str(runs[0].id), str(next(artifact.id for artifact in artifacts if artifact.type == "markdown"))


def pages_to_take() -> dict[str, tuple[str, str, ViewportSize]]:
    """Name of the picture -> path of the page, a text to wait for, size of the window."""
    with get_client(sync_client=True) as client:
        form = client.read_deployment_by_name("extract-features/extract-features").id
    parameters = quote('{"dataset": "shop", "config": {"encoder": "tiny", "modality": "image"}}')
    window: ViewportSize = {"width": 1280, "height": 800}
    return {
        "deployments": ("deployments", "two-stage", {"width": 1280, "height": 560}),
        "form-extract-features": (
            f"deployments/deployment/{form}/run?parameters={parameters}",
            "Encoder",
            window,
        ),
        "two-stage-run": (f"runs/flow-run/{newest_run('')[0]}?tab=Artifacts", "stages", window),
        "comparison": (
            f"artifacts/artifact/{newest_run('demo')[1]}",
            "recommender",
            {"width": 1700, "height": 1500},
        ),
    }


def take(url: str, browser_path: str) -> None:
    """Open each page, wait until it has drawn itself, and save it as a PNG of few colours."""
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context = browser.new_context(color_scheme="light")
        context.route("**/*amplitude.com/**", lambda route: route.abort())
        for name, (path, text, window) in pages_to_take().items():
            page = context.new_page()
            page.set_viewport_size(window)
            page.goto(f"{url}/v2/{path}", wait_until="domcontentloaded")
            page.get_by_text(text).first.wait_for(timeout=60_000)
            page.wait_for_timeout(3_000)  # fonts and graphs
            target = IMAGES / f"{name}.png"
            page.screenshot(path=target)
            Image.open(target).convert("RGB").quantize(128).save(target, optimize=True)
            page.close()
        browser.close()


def main() -> None:
    """Read the command line and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:4200", help="where `tandem up` said its page is")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="path of Chromium or Chrome")
    options = parser.parse_args()
    with temporary_settings({PREFECT_API_URL: f"{options.url}/api"}):
        take(options.url, options.browser)


if __name__ == "__main__":
    main()

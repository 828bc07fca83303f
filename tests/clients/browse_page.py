"""Use the page of a server in Chromium, without a display, and print as JSON what it showed.

python browse_page.py visit URL FOLDER [SCREENSHOT]   the page at URL with the sample smears in FOLDER
python browse_page.py enter URL IMAGE TOKEN           the page behind a front that asks for a token
python browse_page.py names HTML HEADERS LABEL        a page from a file, and an answer with this class
"""

import base64
import io
import json
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
TIMEOUT_MS = 30_000
# Drops or pastes files.
GIVE = """([kind, files]) => {
    const transfer = new DataTransfer();
    for (const [name, type, text] of files) {
        transfer.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, {type}));
    }
    const settings = {bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer};
    const event = kind === "drop" ? new DragEvent(kind, settings) : new ClipboardEvent(kind, settings);
    document.getElementById("stage").dispatchEvent(event);
}"""

# Controls that a screen reader could not name.
UNNAMED = """() => [...document.querySelectorAll("button, input:not([hidden])")].filter(control =>
    !control.getAttribute("aria-label") && !(control.labels || []).length && !control.textContent.trim()
).map(control => control.id)"""


class Visit:
    """A page, what it complained about, and where it sent requests."""

    def __init__(self, browser, **settings):
        context = browser.new_context(viewport={"width": 1280, "height": 800}, **settings)
        context.set_default_timeout(TIMEOUT_MS)
        self.page = context.new_page()
        self.complaints, self.requests, self.open, self.most_open = [], [], 0, 0
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        self.page.on("request", self.started)
        for event in ("requestfinished", "requestfailed"):
            self.page.on(event, self.ended)

    def started(self, request):
        self.requests.append(f"{request.method} {request.url}")
        if request.method == "POST":
            self.open += 1
            self.most_open = max(self.most_open, self.open)

    def ended(self, request):
        self.open -= request.method == "POST"

    def origins(self):
        """All to which something was sent; blob: and data: stay inside the browser."""
        addresses = (urlsplit(request.split(" ", 1)[1]) for request in self.requests)
        return sorted(
            {f"{url.scheme}://{url.netloc}" for url in addresses if url.scheme not in ("blob", "data")}
        )

    def give(self, kind, *files):
        """Drop or paste files: paths, or (name, type, content)."""
        entries = [
            (path.name, "image/jpeg", path.read_bytes()) if isinstance(path, Path) else path for path in files
        ]
        texts = [(name, kind, base64.b64encode(content).decode()) for name, kind, content in entries]
        self.page.evaluate(GIVE, [kind, texts])

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def wait(self, expression):
        """Until it is true; `wait_for_function` needs eval, which the page's policy does not allow."""
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression}: {self.text('body')}"
            self.page.wait_for_timeout(20)

    def wait_for_summary(self, beginning):
        self.wait(f"document.getElementById('summary').textContent.startsWith({json.dumps(beginning)})")
        self.wait("document.getElementById('count').textContent !== '\u2013'")

    def counts(self):
        """Class -> number, as the switches show them."""
        labels = self.page.locator("#classes label")
        return {
            labels.nth(index).locator("span").nth(1).inner_text(): int(
                labels.nth(index).locator(".number").inner_text()
            )
            for index in range(labels.count())
        }

    def focused(self):
        return self.page.evaluate("document.activeElement.id || document.activeElement.closest('[id]').id")


def use_image(visit, smears):
    """Drop one image; move a slider; switch a class off; copy."""
    page, found = visit.page, {}
    visit.give("drop", smears[0])
    visit.wait_for_summary(smears[0].name)
    found["counts"] = visit.counts()
    found["summary"] = visit.text("#summary")
    found["canvas"] = page.locator("#canvas").get_attribute("aria-label")
    found["latency"] = visit.text("#latency")
    found["answer"] = json.loads(visit.text("#json"))
    for part in ("curl", "json"):
        page.click(f"#copy_{part}")
        found[f"copied_{part}"] = page.evaluate("navigator.clipboard.readText()")
    page.locator("#classes label").first.click()
    found["without_a_class"] = visit.text("#summary")
    page.locator("#classes label").first.click()
    before = found["drawn"] = pixels(page)
    page.locator("#score_threshold").fill("0.9")
    visit.wait(f"document.getElementById('summary').textContent !== {json.dumps(found['summary'])}")
    visit.wait("document.getElementById('count').textContent !== '\u2013'")
    found["above_0.9"] = visit.counts()
    found["curl_above_0.9"] = visit.text("#curl")
    found["redrawn"] = pixels(page) != before
    page.locator("#score_threshold").fill(str(page.evaluate("model.score_threshold")))
    visit.wait_for_summary(found["summary"])
    return found


def pixels(page):
    """A number that changes with the picture on the canvas."""
    return page.evaluate("document.getElementById('canvas').toDataURL().length")


def use_several(visit, smears):
    """Drop more images; step through them with the keys; drop one that is none."""
    page, found = visit.page, {}
    visit.give("drop", *smears[1:])
    visit.wait_for_summary(smears[1].name)
    found["thumbnails"] = page.locator("#thumbnails button").count()
    page.evaluate("document.activeElement.blur()")  # the arrow keys would move the slider
    steps = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        name = smears[[2, 0, 2][len(steps)]].name
        visit.wait_for_summary(name)
        steps.append(name)
    found["steps"] = steps
    visit.give("drop", ("notes.txt", "text/plain", b"no image"))
    page.wait_for_selector("#message:not(:empty)")
    found["message_of_text"] = visit.text("#message")
    visit.give("paste", smears[0])
    visit.wait_for_summary(smears[0].name)
    found["error_after_paste"] = page.locator("#error").is_visible()
    page.click("#clear")
    found["after_clear"] = visit.text("#summary")
    return found


def use_keyboard(visit, smears):
    """Go through all controls with Tab, and use some of them."""
    page, found = visit.page, {}
    page.reload()  # so that Tab begins at the top
    visit.give("drop", *smears)
    visit.wait_for_summary(smears[0].name)
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        order.append(visit.focused())
    found["order"] = list(dict.fromkeys(order))
    page.focus("#classes input")
    page.keyboard.press("Space")
    found["switched_off"] = visit.text("#summary")
    page.keyboard.press("Space")
    page.focus("#score_threshold")
    before = page.input_value("#score_threshold")
    page.keyboard.press("ArrowRight")
    found["slider"] = [before, page.input_value("#score_threshold"), visit.text("#position")]
    page.keyboard.press("ArrowLeft")
    found["unnamed"] = page.evaluate(UNNAMED)
    return found


def use_camera(visit):
    """Let the webcam of the browser's own test picture run for some frames."""
    page, found = visit.page, {}
    page.click("#clear")
    visit.most_open = 0
    sent = len(visit.requests)
    page.click("#camera")
    visit.wait("document.getElementById('rate').textContent.endsWith('/s')")
    found["button"] = visit.text("#camera")
    page.click("#camera")
    visit.wait_for_summary("webcam.jpg")
    posts = [request for request in visit.requests[sent:] if request.startswith("POST")]
    found |= {"requests": len(posts), "most_at_a_time": visit.most_open}
    page.wait_for_timeout(500)
    found["after_stop"] = sum(r.startswith("POST") for r in visit.requests[sent:]) - len(posts)
    return found


def use_small_and_dark(visit):
    """The width that the content takes in a window of 400 pixels, and the background in light and dark."""
    page = visit.page
    page.set_viewport_size({"width": 400, "height": 800})
    width = page.evaluate("document.documentElement.scrollWidth")
    canvas = page.locator("#canvas").bounding_box()["width"]
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.emulate_media(color_scheme="light")
    return {"width": width, "canvas": canvas, "colours": colours}


def take_screenshot(browser, url, smears, path):
    """The page with the first smear, and the others beside it."""
    visit = Visit(browser)
    visit.page.goto(url)
    visit.give("drop", *smears)
    visit.wait_for_summary(smears[0].name)
    visit.page.wait_for_timeout(300)  # the thumbnails
    picture = Image.open(io.BytesIO(visit.page.screenshot())).convert("RGB")
    # A third of the size; mapping to the nearest colours makes the smaller file.
    palette = picture.quantize(192)
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def visit_server(browser, url, folder, screenshot=None):
    """Everything with a running server."""
    smears = sorted(Path(folder).glob("*.jpg"))
    visit = Visit(browser, permissions=["clipboard-read", "clipboard-write", "camera"])
    response = visit.page.goto(url)
    found = {"status": response.status, "url": visit.page.url, "title": visit.page.title()}
    found["headers"] = response.all_headers()
    found["image"] = use_image(visit, smears)
    found["several"] = use_several(visit, smears)
    found["keyboard"] = use_keyboard(visit, smears)
    found["camera"] = use_camera(visit)
    found["small"] = use_small_and_dark(visit)
    found |= {"complaints": visit.complaints, "origins": visit.origins()}
    if screenshot:
        take_screenshot(browser, url, smears, screenshot)
    return found


def enter_with_token(browser, url, image, token):
    """The page asks for the token after it was refused."""
    visit = Visit(browser, ignore_https_errors=True)
    page = visit.page
    status = page.goto(url).status
    visit.give("drop", Path(image))
    page.wait_for_selector("#access")
    refusal = visit.text("#message")
    page.fill("#token", token)
    page.keyboard.press("Enter")
    visit.wait_for_summary(Path(image).name)
    stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie.length]")
    found = {"status": status, "refusal": refusal, "counts": visit.counts(), "stored": stored}
    return found | {"asked_again": page.locator("#access").is_visible(), "curl": visit.text("#curl")}


def show_names(browser, html, headers, label):
    """A page from a file, whose server answers with one detection of the class `label`."""
    visit = Visit(browser)
    page, url = visit.page, "http://page.test/predictions/damoyolo"
    detection = {"class_id": 0, "label": label, "score": 0.5, "bbox": [1, 1, 50, 50]}
    answer = {"width": 64, "height": 64, "detections": [detection]}
    head = {"content-type": "text/html; charset=utf-8", **json.loads(Path(headers).read_text())}

    def serve(route):
        if route.request.method == "POST":
            route.fulfill(json=answer)
        else:
            route.fulfill(body=Path(html).read_text(), headers=head)

    page.route("**/*", serve)
    page.goto(url)
    visit.give("drop", (label, "image/jpeg", b"x"))  # the name of the file, too
    visit.wait("document.getElementById('count').textContent === '1'")
    foreign = page.evaluate("document.querySelectorAll('img, iframe, script:not([id])').length")
    shown = {"counts": visit.counts(), "summary": visit.text("#summary"), "elements": foreign}
    return shown | {"complaints": visit.complaints, "requests": visit.requests}


if __name__ == "__main__":
    actions = {"visit": visit_server, "enter": enter_with_token, "names": show_names}
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        print(json.dumps(actions[sys.argv[1]](chromium, *sys.argv[2:])))
        chromium.close()

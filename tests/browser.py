"A headless Chromium, driven over HTTP by the WebDriver protocol of the W3C, without another library."

import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from processes import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def until(ask, seconds, what):
    "What `ask` gives once it is true; AssertionError with `what()` when that takes too long."
    end = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < end, f"after {seconds} s: {what()}"
        time.sleep(0.3)
    return found


def answers(url):
    try:
        return bool(urlopen(url, timeout=5))
    except (URLError, OSError):
        return False


def stop(process):
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


class Browser:
    "One page; `script` runs JavaScript in it."

    def __init__(self, session):
        self.session = session

    def call(self, path, **body):
        request = Request(f"{self.session}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            return json.load(urlopen(request, timeout=120))["value"]
        except HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error

    def script(self, source):
        return self.call("execute/sync", script=source, args=[])

    def wait(self, source, seconds=120):
        return until(lambda: self.script(f"return {source}"), seconds,
                     lambda: self.script("return document.body.innerText")[-3000:])

    def click(self, xpath):
        def clicked():
            try:
                element = self.call("element", using="xpath", value=xpath)
                self.call(f"element/{next(iter(element.values()))}/click")
                return True
            except AssertionError:  # not there yet, or drawn anew
                return False
        until(clicked, 60, lambda: f"{xpath} cannot be clicked")


@contextmanager
def browser(profile):
    "A started browser, closed at the end; `profile` is an empty folder for its files."
    port = free_port()
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/status"), 60, lambda: "no chromedriver")
        options = dict(binary=CHROMIUM, args=["--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                                              "--window-size=1200,1600", f"--user-data-dir={profile}"])
        page = Browser(f"http://127.0.0.1:{port}")
        found = page.call("session", capabilities={"alwaysMatch": {"goog:chromeOptions": options}})
        page.session += f"/session/{found['sessionId']}"
        try:
            yield page
        finally:
            urlopen(Request(page.session, method="DELETE"), timeout=60)  # ends Chromium, also after a failure
    finally:
        stop(driver)

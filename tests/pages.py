"""What a page must be: alone, whole, and legible, as a parser and a browser see it."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np


class Page(html.parser.HTMLParser):
    """Collects tags, attributes, words, and the cells of every row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.tables, self.in_cell = [], False
        self.feed(text.replace("\N{MULTIPLICATION SIGN}", "x"))
        self.tables = [
            [[" ".join(cell.split()) for cell in row] for row in table]
            for table in self.tables
        ]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        self.words.append(data)
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def check_alone(page):
    """It needs nothing else, and every row has a cell for every column."""
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert name not in ("src", "action"), (tag, value)
        if name.endswith("href"):
            assert value.startswith(("#", "data:image/")), (tag, value[:80])
        assert "url(http" not in (value or "")
    for table in page.tables:
        assert len({len(row) for row in table}) == 1, table


def contrast(one, other):
    """Of two colours, ``[red, green, blue]`` up to 255 (WCAG 2)."""

    def luminance(color):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in np.array(color[:3]) / 255
        ]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

PROBE = """
<!doctype html><meta charset="utf-8"><body></body><script>
const pages = %s;
function parts(color) { return (color.match(/[\\d.]+/g) || []).map(Number); }
function behind(node) {
  for (let at = node; at; at = at.parentElement) {
    const color = parts(getComputedStyle(at).backgroundColor);
    if (color.length == 3 || color[3] == 1) return color;
  }
  return [255, 255, 255];
}
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  const root = page.documentElement, clipped = [], texts = [];
  const walker = page.createTreeWalker(page.body, 4);
  while (walker.nextNode()) {
    const node = walker.currentNode, owner = node.parentElement;
    if (!node.data.trim() || owner.closest("style")) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect(), style = view.getComputedStyle(owner);
    if (!owner.closest(".wide") && (box.right > root.clientWidth + 1 || box.left < -1))
      clipped.push(node.data.trim());
    const svg = owner.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    texts.push({
      text: node.data.trim(), size: parseFloat(style.fontSize) * scale,
      color: parts(svg ? style.fill : style.color), behind: behind(svg || owner)});
  }
  const lefts = [...page.querySelectorAll(".panels figure")].map(
    f => f.getBoundingClientRect().left);
  const heads = {};
  for (const head of page.querySelectorAll("th"))
    heads[head.textContent] = head.getBoundingClientRect().right;
  return {overflow: root.scrollWidth - root.clientWidth, clipped, texts, lefts, heads,
          height: root.scrollHeight};
}
const found = {};
let left = 0;
for (const [name, text] of Object.entries(pages)) for (const width of [390, 1280])
  for (const scheme of ["light", "dark"]) {
    const frame = document.createElement("iframe");
    frame.width = width; frame.height = 900;
    frame.style.colorScheme = scheme;
    left += 1;
    frame.onload = () => {
      found[name + " " + width + " " + scheme] = look(frame);
      if (--left == 0) {
        const out = document.createElement("pre");
        out.textContent = JSON.stringify(found);
        out.id = "found";
        document.body.replaceChildren(out);
      }
    };
    frame.srcdoc = text;
    document.body.append(frame);
  }
</script>
"""


def seen_by_a_browser(folder, pages):
    """Page, width and scheme -> what a browser makes of it."""
    probe = folder / "probe.html"
    probe.write_text(PROBE % json.dumps(pages).replace("</", "<\\/"), "utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
    words += ["--virtual-time-budget=20000", "--dump-dom", probe.as_uri()]
    done = subprocess.run(
        [BROWSER, *words], capture_output=True, text=True, timeout=120, check=True
    )
    text = re.search(r'(?s)<pre id="found">(.*?)</pre>', done.stdout)
    assert text, done.stdout[-500:]
    return json.loads(html.unescape(text[1]))


def check_seen(seen):
    """Nothing is cut off, and every text is large and clear enough to be read."""
    assert seen["overflow"] <= 0 and not seen["clipped"], seen["clipped"]
    assert len(seen["texts"]) > 20
    for text in seen["texts"]:
        assert text["size"] >= 8.9, text
        assert contrast(text["color"], text["behind"]) >= 4.5, text

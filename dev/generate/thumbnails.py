# SPDX-License-Identifier: GPL-3.0-or-later
"""Draw the thumbnails of the workflows for large models: ``python dev.py run generate.thumbnails``.

No pictures of these models come with the pack, so a thumbnail is a card with the model's name. The demo workflows have
thumbnails of their results instead (``demo_pictures``). Every thumbnail has the workflow's number, because the front
end lists the workflows in the order of the server's disk.
"""

from __future__ import annotations

import argparse
import sys

from PIL import Image, ImageDraw, ImageFont

from comfy_host import ROOT
from generate.artwork import DENSE, FAINT, GROUND, GUIDED, SPARSE

WIDTH, HEIGHT = 640, 400
MARGIN = 40
ICON_SIZE = 130
BAR = 62  # height of the bar above the picture of a demo workflow
# Name of the model and a line about the workflow, by the workflow's name.
CARDS = {
    "gag_02_sd15": ("SD1.5", "without GAG and with it, CFG 7"),
    "gag_03_sdxl": ("SDXL", "without GAG and with it, CFG 5"),
    "gag_04_sdxl_lightning": ("SDXL Lightning", "4 steps, no CFG"),
    "gag_05_flux_dev": ("Flux.1 dev", "without GAG and with it"),
    "gag_06_flux_kontext": ("Flux.1 Kontext", "change a picture by words"),
    "gag_07_qwen_image": ("Qwen-Image", "CFG 4"),
    "gag_08_z_image_turbo": ("Z-Image Turbo", "8 steps, no CFG"),
    "gag_09_wan_t2v": ("Wan", "text to video"),
    "gag_10_nag_flux_schnell": ("GAG and NAG", "a negative prompt at CFG 1"),
}


def main() -> int:
    """Draw all cards."""
    argparse.ArgumentParser(description="Draw the thumbnails of the workflows for large models.").parse_args()
    for name, (title, line) in CARDS.items():
        card(number_of(name), title, line).save(ROOT / "workflows" / f"{name}.jpg", quality=88, optimize=True)
        print(f"thumbnails: wrote workflows/{name}.jpg")
    return 0


def number_of(name: str) -> str:
    """Return the number in a workflow's name, without a leading zero."""
    return str(int(name.split("_")[1]))


def framed(picture: Image.Image, number: str, title: str) -> Image.Image:
    """Return a picture, shrunk to fit, below a bar with a number and a title; of a high picture its upper part."""
    picture = picture.crop((0, 0, picture.width, min(picture.height, picture.width)))
    frame = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(frame)
    draw.text((16, 4), number, fill=SPARSE, font=ImageFont.load_default(44))
    draw.text((76, 14), title, fill=GUIDED, font=ImageFont.load_default(30))
    room = (WIDTH - 16, HEIGHT - BAR - 8)
    scale = min(room[0] / picture.width, room[1] / picture.height)
    small = picture.convert("RGB").resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
    )
    frame.paste(small, ((WIDTH - small.width) // 2, BAR + (room[1] - small.height) // 2))
    return frame


def card(number: str, title: str, line: str) -> Image.Image:
    """Return a card with a number, a title, a line below it, and the pack's icon."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(picture)
    icon = Image.open(ROOT / "assets" / "icon.png").convert("RGB")
    icon = icon.resize((ICON_SIZE, ICON_SIZE), Image.Resampling.LANCZOS)
    picture.paste(icon, (WIDTH - MARGIN - ICON_SIZE, MARGIN))
    draw.text((MARGIN, MARGIN), number, fill=SPARSE, font=ImageFont.load_default(84))
    draw.line((MARGIN, HEIGHT - 65, WIDTH - MARGIN, HEIGHT - 65), fill=FAINT, width=2)
    size = 76
    while ImageFont.load_default(size).getlength(title) > WIDTH - 2 * MARGIN:
        size -= 2
    draw.text((MARGIN, HEIGHT - 185), title, fill=GUIDED, font=ImageFont.load_default(size))
    draw.text((MARGIN, HEIGHT - 52), line, fill=DENSE, font=ImageFont.load_default(26))
    return picture


if __name__ == "__main__":
    sys.exit(main())

"""The page itself, made with Gradio: a picture and settings in, captions out."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.demo import results
from clipcap_jax.errors import UserError

_WAITING = 16  # requests, beside the one that is answered
_KEPT = 3600  # seconds that an uploaded picture stays on the disk

# As Gradio's own, but dark enough to be read.
COLOURS = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "color_accent": "*primary_700",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
}
STYLE = """
.gradio-container { max-width: 72rem !important; margin: 0 auto; }
.dark [role="tab"][aria-selected="true"] { color: var(--primary-300); }
.clipcap-examples { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); }
.clipcap-examples button { flex-direction: column; min-width: 0 !important; padding: .25rem; }
.clipcap-examples img { width: 3rem; height: 3rem; object-fit: contain; }
.clipcap-results { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.clipcap-results h2 { font-size: 1.1rem; font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.clipcap-results table { border-collapse: collapse; width: 100%; }
.clipcap-results :is(th, td) { padding: .4rem; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--border-color-primary); }
.clipcap-results :is(th, td):not(:first-child) { text-align: right; width: 1%; overflow-wrap: normal; }
.clipcap-results small { color: var(--body-text-color-subdued); }
.clipcap-alert { border-left: 4px solid #b91c1c; padding: .25rem .75rem; margin: 0; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A number that the page asks for, from `least` to `most`."""

    label: str
    least: float
    most: float
    step: float
    info: str

    def check(self, value: Any) -> float:
        """The number, on a step: each length penalty, say, is compiled anew, and not any may be asked for.

        Raises:
          UserError: it is none, or beyond the bounds.
        """
        if not isinstance(value, int | float) or not self.least <= value <= self.most:
            raise UserError(f"{self.label} is {value!r}: it has to be a number from {self.least:g} to {self.most:g}")
        steps = round(value / self.step)
        return steps * self.step if isinstance(self.step, int) else round(steps * self.step, 2)


_SETTINGS = {
    "n": _Setting("Captions", 1, 10, 1, "how many of the picture"),
    "beam_size": _Setting("Beam", 1, 10, 1, "how many are followed at once; no fewer than captions"),
    "length_penalty": _Setting("Length penalty", 0, 2, 0.1, "0 ranks by probability; more is for longer captions"),
    "temperature": _Setting("Temperature", 0.1, 2, 0.1, "below 1 the likely become likelier"),
    "top_p": _Setting("Top-p", 0.05, 1, 0.05, "draw from the likeliest words that have this probability together"),
}


def make(captioners: Mapping[str, Captioner], examples: Sequence[Path]) -> Any:
    """The page as Gradio's Blocks.

    Args:
      captioners: by what the page calls them; the first one's settings are those that it begins with.
      examples: files of pictures.
    """
    import gradio

    [captioner, *_] = captioners.values()
    first = {"n": 5, "temperature": 1, "top_p": 0.9, "length_penalty": captioner.decode.length_penalty}
    first["beam_size"] = max(first["n"], captioner.decode.beam_size)

    def slider(name: str) -> Any:
        setting = _SETTINGS[name]
        bounds = {"minimum": setting.least, "maximum": setting.most, "step": setting.step}
        value = min(max(first[name], setting.least), setting.most)
        return gradio.Slider(value=value, label=setting.label, info=setting.info, min_width=240, **bounds)

    def answerer(*names: str) -> Any:
        def answer(picture: Any, *values: Any) -> str:
            try:
                asked = checked(dict(zip(names, values, strict=True)))
            except UserError as error:
                return results.alert(str(error))
            return results.answer(captioners, picture and Path(picture["path"]), asked)

        return answer

    with gradio.Blocks(title="clipcap demo", analytics_enabled=False, delete_cache=(60, _KEPT)) as page:
        gradio.Markdown("# Captions of your pictures\n\nPictures go no further than the machine that shows this page.")
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(
                    label="Picture",
                    sources=["upload", "webcam", "clipboard"],
                    height=320,
                    buttons=[],
                    alt_text="the picture to be captioned",
                )
                with gradio.Row(elem_classes="clipcap-examples"):
                    for i, path in enumerate(examples, 1):
                        example = gradio.Button(f"Example {i}", icon=path, size="sm", min_width=80)
                        example.click(
                            lambda path=str(path): path, None, picture, show_progress="hidden", api_visibility="private"
                        )
            with gradio.Column():
                shown = gradio.HTML(results.EMPTY, apply_default_css=False)
        count = slider("n")
        with gradio.Tab("Search the likeliest"):
            with gradio.Row():
                searched = [picture, count, slider("beam_size"), slider("length_penalty")]
            search = gradio.Button("Search", variant="primary")
        with gradio.Tab("Draw by chance"):
            with gradio.Row():
                drawn = [picture, count, slider("temperature"), slider("top_p")]
                info = "for the same captions again; empty for others each time"
                drawn += [gradio.Number(0, label="Seed", info=info, precision=0, min_width=240)]
            draw = gradio.Button("Draw", variant="primary")
        # Gradio's own reading of the inputs would decode the picture: its file is read by `Captioner` alone.
        options = {"outputs": shown, "preprocess": False, "api_visibility": "private", "concurrency_id": "captions"}
        gradio.on([picture.change, search.click], answerer("n", "beam_size", "length_penalty"), searched, **options)
        draw.click(answerer("n", "temperature", "top_p", "seed"), drawn, **options)
    page.queue(max_size=_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Captioner.caption` from what the page holds.

    Raises:
      UserError: a number is beyond its bounds.
    """
    asked = {name: _SETTINGS[name].check(value) if name in _SETTINGS else value for name, value in given.items()}
    if "beam_size" in asked:
        asked["beam_size"] = max(asked["beam_size"], asked["n"])
    return asked

"""An endpoint that answers questions of a judge, or fails in the usual ways, and questions that it can answer."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tl_latentlens as tll
from support.chat_endpoint import TIMEOUT, ChatStub
from support.chat_endpoint import fails_often as any_fails_often
from tl_latentlens.vision.judge.questions import Question


class Stub(ChatStub):
    """An endpoint that reads what the judge is shown, says "concrete" of a word that names the gray of the crop, and fails."""

    def read(self, body: dict[str, Any]) -> tuple[str, str]:
        *pictures, text = body["messages"][0]["content"]
        words = re.findall(r'^\d+\. "(.*)"$', text["text"], re.MULTILINE)
        crop = Image.open(io.BytesIO(base64.b64decode(pictures[1]["image_url"]["url"].split(",")[1])))
        gray = np.asarray(crop)[:, :, 0].mean()
        relations = {str(k): "concrete" if w == f"g{gray:.0f}" else "none" for k, w in enumerate(words, 1)}
        return f"{words[0]} on {gray:.0f}", f"So:\n```json\n{json.dumps(relations)}\n```"


def fails_often(question: str, attempt: int) -> str:
    """30 % of all requests fail, each in one of the usual ways; of two questions the answer says nothing."""
    what = any_fails_often(question, attempt)
    return what if what != "answer" else {"g3 on 3": "talk", "g8 on 8": "refusal"}.get(question, "answer")


def questions_on_grays(n: int = 50) -> tll.JudgeQuestions:
    """A patch of each image, as gray inside as its number; the first of its words names that; the control shows the next."""
    pictures, questions = [], []
    for image in range(n):
        picture = np.full((40, 60, 3), 200, np.uint8)
        picture[10:22, 30:48] = image
        pictures.append(picture)
        for shown in (image, (image + 1) % n):
            words = (f"g{image}", "sky", "ing", 'a "quoted"', "↵")
            questions.append(Question(image, 7, "latentlens", "blocks.1.hook_resid_post", words, shown, (30, 10, 48, 22)))
    return tll.JudgeQuestions(tuple(pictures), tuple(questions))


def judge_at(url: str, path: Path, **settings: Any) -> tll.Judge:
    """A judge that asks an endpoint, quickly."""
    defaults = {"base_url": url, "api_key": "none", "timeout": TIMEOUT, "attempts": 10, "concurrency": 4}
    return tll.Judge("m", path, **{**defaults, **settings})

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcap_jax.datasets.readers import read_captions
from clipcap_jax.datasets.source import Problem, Record
from clipcap_jax.datasets.tidy import tidy
from clipcap_jax.errors import UserError


class File(NamedTuple):
    records: list[Record]
    problems: list[Problem]
    notes: list[str]


def read(folder: Path, name: str, text: str | bytes, **fields: str) -> File:
    """What is made of a captions file."""
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    rows, notes = read_captions(path, **fields)
    records, problems, more = tidy(rows)
    return File(records, problems, [note.replace(f"{folder}/", "") for note in notes + more])


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_table_with_semicolons(tmp_path: Path) -> None:
    """As Excel writes it where a comma stands in numbers."""
    text = 'file_name;text\r\na.jpg;A dog, running.\r\nb.jpg;"Two; or three."\r\nc.jpg;One;two.\r\n'
    file = read(tmp_path, "c.csv", text)
    assert [(record.image, record.captions) for record in file.records] == [
        ("a.jpg", ["A dog, running."]),
        ("b.jpg", ["Two; or three."]),
    ]
    assert [problem.detail for problem in file.problems] == ["more than 2; put a text with ';' in quotes"]


def test_jsonl(tmp_path: Path) -> None:
    file = read(
        tmp_path,
        "c.jsonl",
        lines(
            {
                "image": "a/1.jpg",
                "captions": ["A dog.", "  Ein\nHund. "],
                "split": "val",
                "embedding_row": 7,
                "domain": "in",
            },
            {"image_id": 42, "caption": "A cat."},
        ),
    )
    assert file.records == [
        Record("c.jsonl:1", "a/1.jpg", "a/1", ["A dog.", "Ein Hund."], "val", 7, "in"),
        Record("c.jsonl:2", "42", "42", ["A cat."], "", None, ""),
    ]
    assert (file.problems, file.notes) == ([], [])


def test_rows_of_one_picture_are_joined(tmp_path: Path) -> None:
    text = (
        'image,caption,split\n1.jpg,"A dog, running.",train\n2.jpg,"It says ""stop"".",test\n\n1.jpg,Ein Hund,train\n'
    )
    expected = [
        Record("c.csv:2", "1.jpg", "1", ["A dog, running.", "Ein Hund"], "train", None, ""),
        Record("c.csv:3", "2.jpg", "2", ['It says "stop".'], "test", None, ""),
    ]
    assert read(tmp_path, "c.csv", text).records == expected
    assert read(tmp_path, "c.csv", "\ufeff" + text.replace("\n", "\r\n")).records == expected  # as Excel writes it

    tsv = read(tmp_path, "c.tsv", "image_id\tcaption\tembedding_row\tlicense\n1.jpg\tA dog, running.\t3\tCC\n")
    assert tsv.records == [Record("c.tsv:2", "1.jpg", "1.jpg", ["A dog, running."], "", 3, "")]
    assert tsv.notes == ["fields of c.tsv that were not used: license"]


def test_coco(tmp_path: Path) -> None:
    content = {
        "info": {},
        "images": [
            {"id": 9, "file_name": "9.jpg", "height": 480},
            {"id": 3, "file_name": "3.jpg", "split": "val", "domain": "near-domain", "embedding_row": 0},
        ],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "A cat."},
            {"image_id": 9, "id": 2, "caption": "A dog.\n"},
            {"image_id": 3, "id": 3, "caption": "A kitten."},
        ],
    }
    file = read(tmp_path, "c.json", json.dumps(content))
    assert file.records == [
        Record("c.json: images[0]", "9.jpg", "9", ["A dog."], "", None, ""),
        Record("c.json: images[1]", "3.jpg", "3", ["A cat.", "A kitten."], "val", 0, "near-domain"),
    ]
    assert file.problems == []


GOOD = {"image": "1.jpg", "caption": "A dog."}
LIST = {"image": "1.jpg", "captions": ["A dog."]}


@pytest.mark.parametrize(
    ("second", "reason", "detail"),
    [
        ('{"image": "2.jpg", "caption": "A c', "bad JSON", "Unterminated string"),
        ('["2.jpg", "A cat."]', "bad JSON", "not an object"),
        ({"caption": "A cat."}, "missing field", "neither 'image' nor 'image_id'"),
        ({"image": "", "caption": "A cat."}, "missing field", "neither 'image' nor 'image_id'"),
        ({"image": "2.jpg"}, "missing field", "neither 'caption' nor 'captions'"),
        ({"image": "2.jpg", "captions": "A cat."}, "wrong type", "'captions' a list"),
        ({"image": "2.jpg", "captions": ["A cat.", None]}, "wrong type", "'captions' a list"),
        ({"image": ["2.jpg"], "caption": "A cat."}, "wrong type", "'image' must be a text"),
        (
            {"image": "2.jpg", "caption": "A cat.", "embedding_row": 1.5},
            "wrong type",
            "'embedding_row' must be a whole",
        ),
        (
            {"image": "2.jpg", "caption": "A cat.", "embedding_row": True},
            "wrong type",
            "'embedding_row' must be a whole",
        ),
        ({"image": "2.jpg", "caption": "A cat.", "split": "../up"}, "wrong split", "'../up' is not a word"),
        ({"image": "2.jpg", "caption": "\ud83d"}, "broken text", "cut in half"),
        ({"image": "2.jpg", "caption": " \n"}, "empty caption", "image_id 2"),
        ({"image": "2.jpg", "captions": ["A cat.", ""]}, "empty caption", "image_id 2"),
        ({"image": "2.jpg", "captions": []}, "no caption", "image_id 2"),
        (LIST, "duplicate image_id", "1, as in c.jsonl:1"),
        (GOOD | {"split": "val"}, "image in two splits", "1 is in 'val', but in '' in c.jsonl:1"),
        (
            GOOD | {"image": "b.jpg", "image_id": "1"},
            "contradiction",
            "image of 1 is 'b.jpg', but '1.jpg' in c.jsonl:1",
        ),
        (GOOD | {"embedding_row": 4}, "contradiction", "embedding_row of 1 is 4, but None in c.jsonl:1"),
    ],
)
def test_problems_are_named_and_the_rest_is_kept(tmp_path: Path, second: Any, reason: str, detail: str) -> None:
    third = {"image": "3.jpg", "caption": "A bird."}
    second = second if isinstance(second, str) else json.dumps(second)
    file = read(tmp_path, "c.jsonl", lines(GOOD) + second + "\n" + lines(third))
    (problem,) = file.problems
    assert (problem.where, problem.reason) == ("c.jsonl:2", reason)
    assert detail in problem.detail
    assert file.records[0].captions == ["A dog."]
    assert file.records[-1].captions == ["A bird."]


@pytest.mark.parametrize(
    ("row", "reason"),
    [("2.jpg,A cat, sitting.", "too many columns"), ("2.jpg", "too few columns"), ("2.jpg,", "empty caption")],
)
def test_problems_in_csv(tmp_path: Path, row: str, reason: str) -> None:
    file = read(tmp_path, "c.csv", f"image,caption\n1.jpg,A dog.\n\n{row}\n3.jpg,A bird.\n")
    (problem,) = file.problems
    assert (problem.where, problem.reason) == ("c.csv:4", reason)
    assert [record.image for record in file.records if record.captions] == ["1.jpg", "3.jpg"]


def test_problems_in_coco(tmp_path: Path) -> None:
    images: list[dict[str, Any]] = [
        {"id": 1, "file_name": "1.jpg"},
        {"id": 1, "file_name": "b.jpg"},
        {"file_name": "c.jpg"},
    ]
    annotations = [
        {"image_id": 1, "caption": "A dog."},
        {"image_id": 5, "id": 77, "caption": "A cat."},
        {"caption": "?"},
    ]
    file = read(tmp_path, "c.json", json.dumps({"images": images, "annotations": annotations}))
    assert [str(problem) for problem in file.problems] == [
        "c.json: annotations[1]: caption of an unknown image: image_id 5",
        "c.json: annotations[2]: caption of an unknown image: image_id None",
        "c.json: images[0]: duplicate image_id: 1 is of 2 files, whose captions cannot be told apart",
        "c.json: images[1]: duplicate image_id: 1 is of 2 files, whose captions cannot be told apart",
        "c.json: images[2]: no caption: image_id c",
    ]
    assert file.records == []
    images[1]["file_name"] = "1.jpg"
    file = read(tmp_path, "c.json", json.dumps({"images": images, "annotations": annotations}))
    assert "c.json: images[1]: duplicate image_id: 1, as in c.json: images[0]" in map(str, file.problems)
    assert [(record.image_id, record.captions) for record in file.records] == [("1", ["A dog."])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.xml", "", "a captions file is .jsonl, .json, .csv"),
        ("c.jsonl", b'{"image": "1.jpg"}\n\xff\n', "c.jsonl:2: not UTF-8"),
        ("c.csv", "file,text\n1.jpg,A dog.\n", "name the columns.*It has: file, text"),
        ("c.csv", "", "It has: nothing"),
        ("c.json", '{"images": [\n}', "is not JSON.*line 2"),
        ("c.json", "7", "holds neither a list of objects, nor .* but something else"),
        ("c.json", '{"data": [{"url": 1}]}', "but an object with the keys data"),
        ("c.json", '{"images": [], "annotations": [1]}', "has no list of objects 'annotations'"),
    ],
)
def test_files_that_are_not_captions(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, content)
    with pytest.raises(UserError, match=r"missing.jsonl does not exist"):
        read_captions(tmp_path / "missing.jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)
fields = ["image", "image_id", "caption", "captions", "split", "embedding_row", "domain", "file_name", "id"]
objects = st.dictionaries(st.sampled_from(fields), json_values)


@given(st.lists(objects, max_size=4))
def test_whatever_the_types_every_line_is_kept_or_named(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    file = read(folder, "c.jsonl", lines(*rows))
    named = {problem.where for problem in file.problems} | {record.where for record in file.records}
    joined = sum(len(record.captions) for record in file.records)
    assert len(named) + joined >= len(rows)
    read(folder, "c.json", json.dumps({"images": rows, "annotations": rows}))


@given(st.text(st.characters(codec=None) | st.sampled_from('",\n\r\t{}[]'), max_size=60))
def test_whatever_the_text_it_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name, start in [("c.jsonl", ""), ("c.csv", "image,caption\n"), ("c.tsv", ""), ("c.json", "")]:
        with contextlib.suppress(UserError):
            read(folder, name, (start + text).encode(errors="surrogatepass"))


PICTURES = {f"{index}.jpg": f"Picture {index}." for index in range(3)}
LIST_OF_OBJECTS = [{"image_id": name[0], "id": 7, "caption": text} for name, text in PICTURES.items()]


@pytest.mark.parametrize(
    ("name", "text", "fields"),
    [
        ("captions.json", json.dumps(LIST_OF_OBJECTS), {}),  # the original's train_caption.json
        ("captions.json", json.dumps({name: [text] for name, text in PICTURES.items()}), {}),
        ("captions.json", json.dumps(PICTURES), {}),
        (
            "captions.json",
            json.dumps({"images": [{"filename": n, "sentences": [{"raw": t}]} for n, t in PICTURES.items()]}),
            {},
        ),
        ("metadata.jsonl", lines(*({"file_name": name, "text": text} for name, text in PICTURES.items())), {}),
        ("metadata.csv", "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in PICTURES.items()), {}),
        ("captions.txt", "image,caption\n" + "".join(f"{name},{text}\n" for name, text in PICTURES.items()), {}),
        (
            "c.csv",
            "path,alt,caption\n" + "".join(f"{name},{text},\n" for name, text in PICTURES.items()),
            {"image_field": "path", "caption_field": "alt"},
        ),
        (
            "c.jsonl",
            lines(*({"path": name, "alt": text, "captions": ["no"]} for name, text in PICTURES.items())),
            {"image_field": "path", "caption_field": "alt"},
        ),
    ],
)
def test_formats_that_people_have(tmp_path: Path, name: str, text: str, fields: dict[str, str]) -> None:
    file = read(tmp_path, name, text, **fields)
    assert file.problems == []
    assert [(record.image_id, record.captions) for record in file.records] == [
        (name[0], [text]) for name, text in PICTURES.items()
    ]
    assert {record.image.removesuffix(".jpg") for record in file.records} == {"0", "1", "2"}


def test_lavis(tmp_path: Path) -> None:
    train = [{"image": "train2014/1.jpg", "image_id": "coco_1", "caption": text} for text in ("A dog.", "A big dog.")]
    val = [{"image": "val2014/2.jpg", "caption": ["A cat.", "A black cat."]}]
    file = read(tmp_path, "coco_karpathy.json", json.dumps(train + val))
    assert file == (
        [
            Record("coco_karpathy.json: [0]", "train2014/1.jpg", "coco_1", ["A dog.", "A big dog."], ""),
            Record("coco_karpathy.json: [2]", "val2014/2.jpg", "val2014/2", ["A cat.", "A black cat."], ""),
        ],
        [],
        [],
    )


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ("x.jpg,A dog , running , on grass", "A dog , running , on grass"),
        ('x.jpg,"A dog , running"', "A dog , running"),
        ('x.jpg,"Keep left" , painted', '"Keep left" , painted'),
        ('x.jpg,"It says ""stop"""', 'It says "stop"'),
    ],
)
def test_commas_in_kaggles_file(tmp_path: Path, row: str, caption: str) -> None:
    file = read(tmp_path, "captions.txt", f"image,caption\n{row}\n")
    assert file.problems == []
    assert file.records[0].captions == [caption]


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ('"Keep left painted on a board', '"Keep left painted on a board'),
        ('"Keep left" painted on a board', '"Keep left" painted on a board'),
        ('a screen of 27"', 'a screen of 27"'),
        ('"a ""big"" sign"', 'a "big" sign'),
        ('""', None),
        ('"', '"'),
    ],
)
def test_a_quote_in_a_tsv_is_a_letter(tmp_path: Path, row: str, caption: str | None) -> None:
    captions = {index: f"sheet {index}" for index in range(100)} | {20: row, 25: 'a screen of 25"'}
    text = "".join(f"{index}.jpg\t{text}\n" for index, text in captions.items())
    file = read(tmp_path, "c.tsv", f"image\tcaption\n{text}")
    assert len(file.records) == 99 + (caption is not None)
    found = {record.image: record.captions for record in file.records}
    assert found.get("20.jpg") == (None if caption is None else [caption])
    assert found["25.jpg"] == ['a screen of 25"']
    assert [problem.where for problem in file.problems] == ["c.tsv:22"] * (caption is None)


@pytest.mark.parametrize(
    ("name", "rows", "problems", "kept"),
    [
        ("c.csv", ['a.jpg,"Big sign', "b.jpg,second", 'c.jpg,a tv of 42"'], ["c.csv:2: bad line"], "bc"),
        ("c.csv", ['a.jpg,"two', 'lines"', "b.jpg,second"], ["c.csv:2: bad line", "c.csv:3: too few columns"], "b"),
        ("c.tsv", ['a.jpg\t"two', 'lines"', "b.jpg\tsecond"], ["c.tsv:2: bad line", "c.tsv:3: too few columns"], "b"),
        ("c.csv", ['a.jpg,"Keep left" on a board', "b.jpg,second"], ["c.csv:2: bad line"], "b"),
        ("c.csv", ["a.jpg,first", 'b.jpg,"not closed'], ["c.csv:3: bad line"], "a"),
    ],
)
def test_no_row_takes_another(tmp_path: Path, name: str, rows: list[str], problems: list[str], kept: str) -> None:
    separator = "\t" if name == "c.tsv" else ","
    file = read(tmp_path, name, "\n".join([f"image{separator}caption", *rows, ""]))
    assert [f"{problem.where}: {problem.reason}" for problem in file.problems] == problems
    assert [record.image_id for record in file.records] == list(kept)


@pytest.mark.parametrize(
    ("name", "text", "reasons"),
    [
        ("c.jsonl", '{"image": "1.jpg", "caption": "x", "captions": ["y", "z"]}', ["two fields"]),
        ("c.jsonl", '{"image": "1.jpg", "caption": "x", "caption": "y"}', ["doubled key"]),
        ("c.json", '[{"image": "1.jpg", "caption": "x", "caption": "y"}]', ["doubled key"]),
        ("c.json", '{"images": [{"id": 1, "id": 2}], "annotations": [{"id": 1, "id": 2}]}', ["doubled key"] * 2),
        ("c.json", '{"images": [{"filename": "1.jpg", "filename": "2", "sentences": []}]}', ["doubled key"]),
        (
            "c.json",
            '{"images": [{"filename": "1.jpg", "sentences": [{"raw": "x", "raw": "y"}]}]}',
            ["wrong type"],
        ),
    ],
)
def test_what_is_said_twice_is_a_problem(tmp_path: Path, name: str, text: str, reasons: list[str]) -> None:
    file = read(tmp_path, name, text)
    assert file.records == []
    assert [problem.reason for problem in file.problems] == reasons


def test_keys_of_the_whole_file_that_are_there_twice(tmp_path: Path) -> None:
    file = read(tmp_path, "c.json", '{"1.jpg": ["A dog."], "2.jpg": ["A cat."], "1.jpg": ["A bird."]}')
    assert [problem.reason for problem in file.problems] == ["doubled key"]
    assert {record.image_id: record.captions for record in file.records} == {"1": ["A dog."], "2": ["A cat."]}
    with pytest.raises(UserError, match="has the key 'images' twice"):
        read(tmp_path, "c.json", '{"images": [], "images": [], "annotations": []}')


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,caption,caption", "the column 'caption' is there twice"),
        ("image,caption,captions", "there are both 'caption' and 'captions'"),
        ("photo,alt", r"It has: photo, alt. --image-field and --caption-field say"),
    ],
)
def test_columns_that_do_not_say_what_is_meant(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, "c.csv", f"{header}\n1.jpg,A dog.,A cat.\n")


def test_fields_that_cannot_be_guessed_are_named(tmp_path: Path) -> None:
    (problem,) = read(tmp_path, "c.jsonl", lines({"photo": "1.jpg", "alt": "A dog."})).problems
    assert problem.detail == (
        "neither 'image' nor 'image_id'. It has: photo, alt; --image-field and --caption-field say which is which"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "c.jsonl",
            '{"image": "1.jpg", "error": "no picture"}\n{"image": "2.jpg", "caption": "A dog.", "error": "?"}\n',
        ),
        ("c.csv", "image,caption,error\n1.jpg,,no picture\n2.jpg,A dog.,?\n"),
    ],
)
def test_rows_that_say_why_they_have_no_caption(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (without, record), _ = read_captions(tmp_path / name)
    assert without == Problem(f"{name}:{1 + (name == 'c.csv')}", "no caption", "no picture")
    assert isinstance(record, Record)
    assert record.captions == ["A dog."]

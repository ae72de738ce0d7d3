from clipcap_jax.commands.arranged import best_first


def test_the_best_first() -> None:
    """Captions that were drawn are in no order."""
    scores = {"one": [-1.0], "two": [-5.0, -0.1], "none": [], "three": [-0.5, -3.0]}
    rows = [
        {"image": name, "captions": [{"score": score} for score in of]} if of else {"image": name, "error": "broken"}
        for name, of in scores.items()
    ]
    ordered, inputs = best_first(rows, list(scores))
    assert [row["image"] for row in ordered] == inputs == ["two", "three", "one", "none"]

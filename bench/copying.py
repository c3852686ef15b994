"""Prompts whose answers repeat much of them, and prompts whose answers do not."""

from __future__ import annotations

_POEM = """The lamp burned low in the harbour house,
The tide came in with a sound like breath,
And the old man counted the boats that were left,
And the girl kept watch at the window.
The wind went round by the northern wall,
It rattled the latch and it lifted the snow,
And nobody spoke of the boat that was late,
And nobody went from the window."""

_CODE = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("peek into an empty stack")
        return self.items[-1]

    def __len__(self):
        return len(self.items)
"""

_LOG = "\n".join(
    f"2026-03-{day:02d} 08:{minute:02d}:11 INFO worker-{day % 3} finished job {1000 + 7 * day} in {minute} ms"
    for day, minute in zip(range(1, 15), (12, 48, 33, 7, 51, 29, 16, 44, 3, 58, 21, 37, 9, 26), strict=True)
)

_TABLE = "\n".join(
    ["name,city,year"]
    + [
        f"{name},{city},{year}"
        for name, city, year in (
            ("Anna", "Lisbon", 1984),
            ("Bruno", "Turin", 1991),
            ("Clara", "Ghent", 1978),
            ("David", "Malmo", 2001),
            ("Elena", "Split", 1969),
            ("Farid", "Tunis", 1995),
            ("Greta", "Basel", 1988),
            ("Henri", "Lyon", 1973),
        )
    ]
)

_JSON = """{"orders": [{"id": 1, "item": "lamp", "price": 24.5, "paid": true},
{"id": 2, "item": "chair", "price": 79.0, "paid": false},
{"id": 3, "item": "desk", "price": 210.0, "paid": true},
{"id": 4, "item": "shelf", "price": 55.25, "paid": false},
{"id": 5, "item": "rug", "price": 130.0, "paid": true}]}"""

_LETTER = """Dear Mrs Marlow,

thank you for your letter of the third of May. We have looked into the matter of the broken window and found that the
frame had been damaged before it was delivered. A new one will be sent to you in the course of next week, and our
fitter will call on you beforehand to agree on a day. We are sorry for the trouble this has caused you.

Yours sincerely,
the customer service"""

_RECIPE = """Heat the oven to 180 degrees. Mix 200 grams of flour with 100 grams of sugar and a pinch of salt. Rub in
120 grams of cold butter until the mixture looks like crumbs. Add one egg and the zest of a lemon, and press the dough
together. Let it rest in the cold for half an hour, roll it out, cut out rounds, and bake them for twelve minutes."""

_LIST = """1. Unplug the machine before you open it.
2. Remove the four screws on the back panel.
3. Lift the panel and put it aside.
4. Pull the blue cable from the socket marked J4.
5. Slide the old filter out to the left.
6. Slide the new filter in from the left until it clicks.
7. Put the blue cable back into the socket marked J4.
8. Put the panel back and tighten the four screws."""

_CONFIG = """server:
  host: 0.0.0.0
  port: 8080
  workers: 4
  timeout_seconds: 30
database:
  url: postgres://localhost:5432/app
  pool_size: 10
  timeout_seconds: 5
logging:
  level: info
  file: /var/log/app.log
"""

_ARTICLE = """The harbour bridge was closed on Tuesday morning after an inspection found cracks in two cables. The
city council said that the closure was a precaution and that the bridge would be open again by the end of the month.
Ferries will run every ten minutes until then, and tickets for the bus are valid on board."""

COPYING: tuple[str, ...] = tuple(
    f"{task}\n\n{text}"
    for task, text in (
        ("Repeat the following poem word for word:", _POEM),
        ("Repeat this Python file exactly as it is, and nothing else:", _CODE),
        ("Copy this log, line by line:", _LOG),
        ("Copy this table, line by line:", _TABLE),
        ("Repeat this JSON document exactly:", _JSON),
        ("Repeat this letter word for word:", _LETTER),
        ("Write out this recipe again, word for word:", _RECIPE),
        ("Repeat these instructions exactly, all eight of them:", _LIST),
        ("Print this configuration file again, unchanged:", _CONFIG),
        ("Quote this article in full:", _ARTICLE),
    )
)
"""Ten; an answer may be as long as what it repeats."""

PROSE: tuple[str, ...] = (
    "Why is the sky blue?",
    "Tell me a story about a lighthouse keeper.",
    "Explain quantum computing in simple terms.",
    "Who was Napoleon, and why do people still talk about him?",
    "Describe a walk through a forest in autumn.",
    "What makes a good friend?",
)

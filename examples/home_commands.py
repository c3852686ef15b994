"""Writes conversations of a voice assistant for a home, which answers a command with the JSON object to execute.

    python examples/home_commands.py > examples/home_commands.jsonl

examples/home_commands.jsonl is the output of this program, as data for docs/finetuning.md. Like this program it has the
licence of the project.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "living room", "hall", "office", "attic")
SWITCHED = ("lamp", "fan", "radio", "heater", "coffee machine", "television")
POLITE = ("", "Please ", "Could you ", "Hey, ", "Can you ", "I would like you to ")
HOURS = {7: "7 in the morning", 8: "8 am", 12: "noon", 17: "5 pm", 21: "9 in the evening", 23: "11 pm"}


def switch(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Turn a device on or off."""
    device, room, state = rng.choice(SWITCHED), rng.choice(ROOMS), rng.choice(("on", "off"))
    text = rng.choice(
        (
            f"turn {state} the {device} in the {room}",
            f"turn the {device} in the {room} {state}",
            f"switch the {room} {device} {state}",
        )
    )
    return text, {"action": "switch", "device": device, "room": room, "state": state}


def brightness(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Dim the light."""
    room, level = rng.choice(ROOMS), rng.randrange(10, 100, 10)
    text = rng.choice((f"dim the {room} to {level} percent", f"set the light in the {room} to {level}%"))
    return text, {"action": "dim", "room": room, "level": level}


def temperature(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Set the heating."""
    room, degrees = rng.choice(ROOMS), rng.randrange(16, 26)
    text = rng.choice((f"heat the {room} to {degrees} degrees", f"make it {degrees} degrees in the {room}"))
    return text, {"action": "heat", "room": room, "degrees": degrees}


def timer(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Set a timer or an alarm."""
    if rng.random() < 0.5:
        minutes = rng.randrange(1, 60)
        text = rng.choice((f"set a timer for {minutes} minutes", f"wake me in {minutes} minutes"))
        return text, {"action": "timer", "minutes": minutes}
    hour = rng.choice([*HOURS])
    text = rng.choice((f"set an alarm for {HOURS[hour]}", f"wake me at {HOURS[hour]}"))
    return text, {"action": "alarm", "hour": hour}


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Different conversations of one or two commands."""
    rng = random.Random(seed)  # noqa: S311
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        messages = []
        for _ in range(rng.choice((1, 1, 1, 2))):
            text, command = rng.choice((switch, brightness, temperature, timer))(rng)
            polite = rng.choice(POLITE)
            text = f"{polite}{text}" if polite else text[0].upper() + text[1:]
            text += "?" if polite.startswith(("Could", "Can")) else rng.choice((".", "", "!"))
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": json.dumps(command)}]
        found[json.dumps(messages)] = {"messages": messages}
    return list(found.values())


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description="Write conversations as JSONL to stdout.")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for row in conversations(options.rows, options.seed):
        print(json.dumps(row))


if __name__ == "__main__":
    main()

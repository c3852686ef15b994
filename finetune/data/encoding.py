"""`ConversationEncoder`: turns conversations into samples, with the prompts that the runtime would feed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.finetune.data.formats import Conversation
from llm_edge.finetune.data.problems import RowError
from llm_edge.finetune.data.sample import Sample
from llm_edge.runtime.errors import CheckpointError, ContextLengthError, InputError
from llm_edge.runtime.text.answer_stream import separate_reasoning
from llm_edge.runtime.text.prompts import PromptFormat, PromptProcessor
from llm_edge.runtime.text.reasoning_parser import reasoning_parser
from llm_edge.runtime.text.tokenizer import PreparedChat, Tokenizer

THINK_TAGS = ("<think>", "</think>")
"""Tags around the reasoning in answers of a data file; the model's own delimiters are read too."""

Message = Mapping[str, Any]


def prompt_processor(checkpoint: Checkpoint) -> PromptProcessor:
    """The prompt encoding of the bundle that an export of this checkpoint would write.

    Raises:
        BundleError, TemplateError: the tokenizer or the chat template cannot be used.
        CheckpointError: the tokenizer belongs to another model.
    """
    assets, size, where = checkpoint.tokenizer, checkpoint.config.vocab_size, Path(checkpoint.source.name)
    tokenizer = Tokenizer.from_json(
        assets.tokenizer_json,
        where / "tokenizer.json",
        assets.tokenizer_config,
        assets.chat_template,
        assets.named_templates,
        vocab_size=size,
    )
    if tokenizer.vocab_size > size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only {size}: "
            "use the tokenizer that belongs to the weights"
        )
    context = checkpoint.config.max_position_embeddings
    prompt_format = PromptFormat(where, size, context, checkpoint.generation, checkpoint.reasoning, checkpoint.guards)
    return PromptProcessor(prompt_format, tokenizer)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The samples of a conversation.

    Attributes:
        samples: one, as long as the chat template repeats earlier turns as they were generated; a further one starts at
            each answer whose prompt does not, for example because it leaves out earlier reasoning. Empty if not even
            the first answer fits.
        complete: no answer was left out because it was too long.
        reasoning_as_text: reasoning is written as text between `THINK_TAGS`, because the model has no delimiters.
    """

    samples: tuple[Sample, ...]
    complete: bool
    reasoning_as_text: bool


class ConversationEncoder:
    """Encodes conversations for one model, in samples of at most `max_length` tokens.

    Attributes:
        prompts: encodes prompts as `Model.chat` does.
        max_length: maximum number of tokens of a sample, at most the model's context.
    """

    def __init__(self, prompts: PromptProcessor, max_length: int) -> None:
        self.prompts = prompts
        self.max_length = min(max_length, prompts.format.context_length)
        self._end = _end_token(prompts)
        delimiters = prompts.delimiters
        self._tags = {THINK_TAGS} if delimiters is None else {THINK_TAGS, (delimiters.start, delimiters.end)}
        self._ids = list(range(prompts.format.vocab_size))  # samples share these objects, which saves memory

    def encode(self, conversation: Conversation, line: int) -> Encoded:
        """The samples of a conversation in a line of a file.

        Raises:
            RowError: the chat template rejects the conversation or cannot write one of its answers.
        """
        messages = [self._with_reasoning_field(message) for message in conversation.messages]
        as_text = self.prompts.delimiters is None and any("reasoning_content" in message for message in messages)
        if as_text:
            messages = [_with_reasoning_as_text(message) for message in messages]
        drafts: list[_Draft] = []
        complete = True
        try:
            for (prompt, answer), trained in self._turns(conversation, messages):
                if len(prompt) + len(answer) > self.max_length:
                    complete = False
                    break
                if not drafts or prompt[: len(drafts[-1].ids)] != drafts[-1].ids:
                    drafts.append(_Draft())
                drafts[-1].add(prompt, answer, trained)
        except ContextLengthError:  # so long that it was not encoded
            complete = False
        except InputError as error:
            raise RowError(str(error)) from error
        samples = [self._sample(draft, line) for draft in drafts if any(draft.trained)]
        return Encoded(tuple(samples), complete, as_text)

    def _sample(self, draft: _Draft, line: int) -> Sample:
        """A sample that ends with the last trained id."""
        length = len(draft.trained) - draft.trained[::-1].index(True)
        ids = tuple(self._ids[token] for token in draft.ids[:length])
        return Sample(ids, (False, *draft.trained[1:length]), line)

    def _turns(
        self, conversation: Conversation, messages: Sequence[Message]
    ) -> Iterator[tuple[tuple[list[int], list[int]], bool]]:
        """Ids of prompt and answer of each turn, and whether the answer is trained."""
        tokenizer = self.prompts.tokenizer
        if conversation.pair and tokenizer.chat is None:
            question, answer = (str(message["content"]) for message in messages)
            tokenizer.check_length(answer, self.max_length)
            yield (self.prompts.encode_prompt(question), [*tokenizer.encode(answer), self._end]), True
            return
        variables = dict(conversation.variables or {})
        if conversation.tools is not None:
            variables["tools"] = list(conversation.tools)
        prepared = self.prompts.prepare_chat(messages, variables)
        for i, trained in enumerate(conversation.trained):
            if messages[i]["role"] == "assistant":
                yield self._turn(prepared, prepared.messages[:i], prepared.messages[i]), trained

    def _turn(
        self, prepared: PreparedChat, history: Sequence[Message], message: Message
    ) -> tuple[list[int], list[int]]:
        """Ids of the prompt of an answer, and of the answer with its end token."""
        prompt_text = prepared.render(history, add_generation_prompt=True)
        prompt = prepared.encode(prompt_text, self.max_length)
        text = self._answer_text(prepared, history, message, prompt_text, prompt)

        def encode(answer_text: str) -> list[int]:
            whole = prepared.encode(prompt_text + answer_text, self.max_length)
            if whole[: len(prompt)] == prompt:
                return whole[len(prompt) :]
            return prepared.encode(answer_text, self.max_length)  # a token would span the end of the prompt

        answer = encode(text)
        end = next((i for i, token in enumerate(answer) if token in self.prompts.end_tokens), None)
        if end is None:  # the template does not write it
            return prompt, [*encode(text.rstrip()), self._end]
        return prompt, answer[: end + 1]

    def _answer_text(
        self, prepared: PreparedChat, history: Sequence[Message], message: Message, prompt_text: str, prompt: list[int]
    ) -> str:
        """What the model should generate after a prompt: the template's own text of the answer as far as possible."""

        def render(answer: Message) -> str:
            return prepared.render([*history, answer], add_generation_prompt=False)

        delimiters, tokenizer = self.prompts.delimiters, self.prompts.tokenizer
        inside = reasoning_parser(delimiters, tokenizer, prompt, self.prompts.end_tokens).inside
        reasoning = str(message.get("reasoning_content", ""))
        if delimiters is None or not (reasoning or inside):
            return _continuation(prompt_text, render(message)) or _written_answer(message, render(message))
        marker = f"reasoning-{secrets.token_hex(16)}"  # shows where the template writes reasoning, if at all
        text = _continuation(prompt_text, render({**message, "thinking": marker, "reasoning_content": marker}))
        if text is not None and marker in text:
            return text.replace(marker, reasoning)
        plain = {key: value for key, value in message.items() if key not in ("thinking", "reasoning_content")}
        answer = None if inside else _continuation(prompt_text, render(plain))
        answer = answer or _written_answer(plain, render(plain))
        opening = "" if inside else f"{delimiters.start}\n"
        return f"{opening}{reasoning}\n{delimiters.end}\n\n{answer}"

    def _with_reasoning_field(self, message: Message) -> Message:
        """An answer that begins with reasoning between tags, with the reasoning in its field."""
        content = message["content"]
        if message["role"] != "assistant" or "reasoning_content" in message:
            return message
        tags = next((pair for pair in self._tags if content.lstrip().startswith(pair[0])), None)
        if tags is None:
            return message
        if tags[1] not in content:
            raise RowError(f"an answer has {tags[0]} without {tags[1]}")
        separated = dict(separate_reasoning([message], *tags)[0])
        if not separated["reasoning_content"]:
            del separated["reasoning_content"]
        if not separated["content"].strip() and not message.get("tool_calls"):
            raise RowError("an answer is empty")
        return separated


@dataclass(slots=True)
class _Draft:
    """A sample under construction."""

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)

    def add(self, prompt: list[int], answer: list[int], trained: bool) -> None:
        """Add a turn whose prompt begins with the ids so far."""
        between = prompt[len(self.ids) :]
        self.ids += [*between, *answer]
        self.trained += [False] * len(between) + [trained] * len(answer)


def _end_token(prompts: PromptProcessor) -> int:
    """The token that ends an answer where the chat template writes none."""
    if not prompts.end_tokens:
        raise CheckpointError(
            f"{prompts.format.where}: no token ends an answer: name it in generation_config.json (eos_token_id)"
        )
    eos = prompts.tokenizer.eos_token_id
    return eos if eos is not None and eos in prompts.end_tokens else min(prompts.end_tokens)


def _continuation(prompt: str, whole: str) -> str | None:
    return whole[len(prompt) :] if whole.startswith(prompt) else None


def _written_answer(message: Message, whole: str) -> str:
    """The answer and what the template writes after it, in a conversation that ends with it."""
    content = str(message["content"]).strip()
    _, found, after = whole.rpartition(content)
    if not found or message.get("tool_calls"):
        raise RowError("the chat template does not continue its own prompt with this answer")
    return content + after


def _with_reasoning_as_text(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    start, end = THINK_TAGS
    text = f"{start}\n{message['reasoning_content']}\n{end}\n\n{message['content']}"
    return {**{key: value for key, value in message.items() if key != "reasoning_content"}, "content": text}

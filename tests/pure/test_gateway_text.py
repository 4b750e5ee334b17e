"""Detokenising and stop strings: what a client sees does not depend on how the text was cut into tokens."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.stream import Choice, Delta, StopMatcher, merged
from services.gateway.tokenizer import REPLACEMENT, ByteDetokenizer, Tokenizer, WindowDetokenizer
from shared.errors import ModelError, RequestRejected
from shared.messages import Tokens
from shared.types import FinishReason, TokenLogprob, pack_ids
from tests.tiny_tokenizer import SPECIAL, make_tokenizer_dir

TEXTS = [
    "the end of the stream",
    "日本語 naïve 🙂🙃 café",
    "🙂" * 40,
    "a\n\n b\t<0x41> ▁",
    "👩‍👩‍👧 family 한국어 עברית",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))))


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: words with a leading ▁, bytes for the rest, the first space of a text stripped."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Core
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "▁the", "▁end", "▁", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Core(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], byte_fallback=True))
    core.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"))


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt or [])
    return [*[detokenizer.push(token) for token in ids], detokenizer.flush()]


@given(ids=st.lists(st.integers(len(SPECIAL), 399), max_size=60), cut=st.integers(0, 60), special=st.booleans())
@settings(max_examples=150)
def test_a_text_told_by_bytes_is_the_one_told_by_decoding(
    tokenizer: Tokenizer, ids: list[int], cut: int, special: bool
) -> None:
    told = ByteDetokenizer(tokenizer, ids[:cut], special=special)
    before = tokenizer.decode(ids[:cut], special=special)
    after = "".join([*map(told.push, ids[cut:]), told.flush()])
    text = tokenizer.decode(ids, special=special)
    assert text.endswith(after)
    begun = len(before) - len(before.rstrip(REPLACEMENT))  # at most: bytes that the answer may complete
    assert len(before) - begun <= len(text) - len(after) <= len(before)


class Counting(Tokenizer):
    """A tokenizer that counts what it is asked for."""

    asked = 0

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        self.asked += len(ids)
        return super().decode(ids, special=special)

    def text_bytes(self, token: int, *, special: bool) -> bytes:
        self.asked += 1
        return super().text_bytes(token, special=special)


def test_a_token_costs_the_same_however_long_the_answer_is(tokenizer: Tokenizer) -> None:
    byte_fallback = byte_fallback_tokenizer()
    emoji = [6 + byte for byte in "🙂".encode()]
    for of, ids in (
        (tokenizer, tokenizer.encode(TEXTS[0], special=False) * 600),
        (byte_fallback, [2, 3, *emoji] * 500),
    ):
        counting = Counting(of._tokenizer)
        detokenizer, counts = counting.detokenizer(), []
        for start in range(0, 3000, 1000):
            counting.asked = 0
            for token in ids[start : start + 1000]:
                detokenizer.push(token)
            counts.append(counting.asked)
        assert max(counts) <= 1.1 * min(counts)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    seen = pieces(tokenizer, tokenizer.encode(text, special=False))
    assert "".join(seen) == text
    assert not any(REPLACEMENT in piece for piece in seen)
    assert seen[-1] == ""
    window = WindowDetokenizer(tokenizer)
    assert [*map(window.push, tokenizer.encode(text, special=False)), window.flush()] == seen


@given(ids=st.lists(st.integers(0, 399), max_size=200))
@settings(max_examples=150)
def test_any_tokens_join_to_what_decoding_them_at_once_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_broken_bytes_come_through_before_the_end(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("🙂", special=False)[:1] * 200
    seen = pieces(tokenizer, broken)
    assert "".join(seen) == tokenizer.decode(broken)
    assert sum(map(bool, seen)) > 5


def test_a_tokenizer_that_strips_a_first_space_keeps_those_between_prompt_and_answer() -> None:
    tokenizer = byte_fallback_tokenizer()
    the, end, emoji = 2, 3, [6 + byte for byte in "🙂".encode()]
    assert pieces(tokenizer, [the, *emoji, end], prompt=[1, the]) == [" the", "", "", "", "🙂", " end", ""]
    assert "".join(pieces(tokenizer, [the, *emoji, *emoji, end, *emoji[:2]])) == f"the🙂🙂 end{REPLACEMENT * 2}"
    assert tokenizer.token_bytes(emoji[0]) == b"\xf0"
    assert tokenizer.token_bytes(the) == b" the"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>the<|im_end|>", special=False)
    assert len(ids) == 3
    assert pieces(tokenizer, ids) == ["", "the", "", ""]
    assert tokenizer.token_bytes(ids[0]) == b"<|im_start|>"


def test_token_bytes_join_to_the_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, special=False))) == text.encode()


def test_chat_template_problems_are_the_clients(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestRejected, match="must not be the assistant") as refused:
        tokenizer.render_chat([{"role": "assistant", "content": "hi"}])
    assert (refused.value.status, refused.value.param) == (400, "messages")
    bare = Tokenizer.load(str(make_tokenizer_dir(tmp_path, chat_template=None)))
    with pytest.raises(RequestRejected, match="no chat template"):
        bare.render_chat([{"role": "user", "content": "hi"}])


def test_a_missing_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be loaded"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(ModelError, match="on this host"):
        Tokenizer.load("/nowhere/at/all")


# -- where a prompt ends within a character ---------------------------------------------------------------------------


def test_a_character_that_begins_in_the_prompt_is_told_once_it_is_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi \0🙃", special=False)  # not among the words that the tokenizer has learnt
    assert len(ids) >= 4
    for cut in (1, 2, 3):
        told = pieces(tokenizer, ids[-cut:], prompt=ids[:-cut])
        whole = tokenizer.decode(ids[:-cut]).removesuffix(REPLACEMENT)
        assert whole + "".join(told) == tokenizer.decode(ids)
        assert REPLACEMENT not in "".join(told)


def test_a_replacement_character_in_the_prompt_is_not_told_again(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(f"hi {REPLACEMENT}", special=False)
    assert pieces(tokenizer, tokenizer.encode(" end", special=False), prompt=prompt)[0] != ""
    assert "".join(pieces(tokenizer, tokenizer.encode(" end", special=False), prompt=prompt)) == " end"


@pytest.mark.parametrize("told_before", [1, 2, 3])
def test_bytes_of_a_character_in_the_prompt_are_completed_by_the_answer(told_before: int) -> None:
    tokenizer = byte_fallback_tokenizer()
    the, end, emoji = 2, 3, [6 + byte for byte in "🙂".encode()]
    for before in ([1, the], [1, *emoji, *emoji, *emoji]):
        prompt, ids = [*before, *emoji[:told_before]], [*emoji[told_before:], end]
        assert "".join(pieces(tokenizer, ids, prompt=prompt)) == "🙂 end"


def test_characters_of_bytes_come_whole_one_after_the_other() -> None:
    tokenizer = byte_fallback_tokenizer()
    text = "🙂é日本語🙃" * 20
    ids = [6 + byte for byte in text.encode()]
    seen = pieces(tokenizer, ids, prompt=[1, 2])
    assert "".join(seen) == text
    assert not any(REPLACEMENT in piece for piece in seen)


def test_special_tokens_have_a_text_where_it_is_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>the<|im_end|>", special=False)
    choice = Choice(tokenizer, [], ["<|im_end|>"], special=True)
    assert merged([delta for token in ids if (delta := choice.feed(event([token])))]).text == "<|im_start|>the"


# -- stop strings ----------------------------------------------------------------------------------------------------


def run_matcher(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    matcher, sent = StopMatcher(stops), ""
    for part in parts:
        text, stopped = matcher.feed(part)
        sent += text
        if stopped:
            return sent, True
    return sent + matcher.flush(), False


@pytest.mark.parametrize("size", range(1, 12))
def test_a_stop_string_is_found_over_any_borders(size: int) -> None:
    text = "one two STOP three"
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    assert run_matcher(["STOP"], parts) == ("one two ", True)
    assert run_matcher(["STOPS", "TOPS"], parts) == (text, False)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    parts=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_no_part_of_a_stop_string_is_ever_sent(stops: list[str], parts: list[str]) -> None:
    text = "".join(parts)
    sent, stopped = run_matcher(stops, parts)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(sent)
    if stopped:
        assert not any(stop in sent for stop in stops)
        assert any(text[len(sent) :].startswith(stop) for stop in stops)
    else:
        assert sent == text


def test_only_what_may_become_a_stop_string_is_held() -> None:
    matcher = StopMatcher(["END!"])
    assert matcher.feed("the E") == ("the ", False)
    assert matcher.feed("N") == ("", False)
    assert matcher.feed("x") == ("ENx", False)


# -- choices ---------------------------------------------------------------------------------------------------------


def event(tokens: list[int], finish: FinishReason | None = None, logprobs: bool = False, cached: int = 0) -> Tokens:
    chosen = tuple(TokenLogprob(token, -1.0) for token in tokens) if logprobs else ()
    return Tokens("r", pack_ids(tokens), chosen, (), finish, cached)


def test_tokens_after_a_stop_string_are_dropped_with_their_logprobs(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the end of the story", special=False)
    choice = Choice(tokenizer, [], ["end"])
    delta = choice.feed(event(ids, logprobs=True))
    assert delta is not None
    assert (delta.text, delta.finish_reason) == ("the ", "stop")
    assert len(delta.tokens) == len(delta.logprobs) == choice.completion_tokens < len(ids)
    assert choice.feed(event(ids)) is None


def test_a_stop_string_is_part_of_the_text_where_it_is_asked_for(tokenizer: Tokenizer) -> None:
    choice = Choice(tokenizer, [], ["e", "end"], keep_stop=True)
    delta = choice.feed(event(tokenizer.encode("of an end!", special=False)))
    assert delta is not None
    assert (delta.text, delta.finish_reason) == ("of an e", "stop")


def test_a_stop_string_in_the_last_tokens_wins_over_length(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the end", special=False)
    choice = Choice(tokenizer, [], ["end"])
    delta = choice.feed(event(ids, "length"))
    assert delta is not None
    assert (delta.text, delta.finish_reason) == ("the ", "stop")


def test_what_was_held_back_comes_with_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the end", special=False)
    choice = Choice(tokenizer, [], ["end!"])
    deltas = [choice.feed(event([token])) for token in ids] + [choice.feed(event([], "stop", cached=4))]
    last = deltas[-1]
    assert last is not None
    assert last.finish_reason == "stop"
    assert "".join(delta.text for delta in deltas if delta) == "the end"
    assert choice.cached_tokens == 4


def test_prompt_logprobs_in_parts_come_with_the_first_delta(tokenizer: Tokenizer) -> None:
    choice = Choice(tokenizer, [5, 6, 7], [])
    assert choice.feed(Tokens("r", b"", (), (TokenLogprob(6, -1.0),), None, 0)) is None
    first = choice.feed(Tokens("r", pack_ids([9]), (), (TokenLogprob(7, -2.0),), None, 0))
    second = choice.feed(event([10], "length"))
    assert first is not None
    assert second is not None
    assert [logprob.token for logprob in first.prompt_logprobs] == [6, 7]
    assert (first.first, second.first) == (True, False)
    whole = merged([first, second])
    assert whole == Delta(
        text=tokenizer.decode([9, 10]),
        tokens=(9, 10),
        logprobs=(),
        finish_reason="length",
        first=True,
        prompt_logprobs=first.prompt_logprobs,
    )

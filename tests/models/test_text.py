"""Tokenizer, towers and the records they give, on real CLIP classes at tiny widths."""

import warnings

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.text import END, START, TextTower, TextTowers, word_tokenizer

WORDS = ["red", "bored", "or", "orange", "range", "a", "an", "and", "circle", "of", "left", ",", "Café"]
PHRASES = ["a red circle", "orange", "a red circle", "", "zebra, left of an orange"]


def tower(width, *, layers=2, heads=2, projection=None, end=None, pad=None, max_length=32, words=WORDS):
    tokenizer = word_tokenizer(words, max_length=max_length)
    if pad is not None:
        tokenizer.pad_token = pad
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if end is None else end,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(width)
        encoder = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
        with torch.no_grad():  # CLIP's own initialisation is too small to tell features apart
            for parameter in encoder.parameters():
                parameter.normal_(std=0.2)
    return TextTower(tokenizer, encoder.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def one():
    return TextTowers([tower(24)])


@pytest.fixture(scope="module")
def two():
    return TextTowers(
        [tower(24, layers=3), tower(40, heads=4, projection=20, pad="!")],
        caption_layer="penultimate",
        caption_pooled=True,
    )


class TestWordTokenizer:
    @pytest.mark.parametrize("words", [WORDS, WORDS[::-1]], ids=["given", "reversed"])
    def test_every_word_is_one_token(self, words):
        tokenizer = word_tokenizer(words, max_length=16)
        assert [len(tokenizer(word)["input_ids"]) for word in words] == [3] * len(words)
        text = " ".join(words)
        assert len(tokenizer(text)["input_ids"]) == len(words) + 2

    def test_the_order_of_words_fixes_their_ids(self):
        first, second = (word_tokenizer(words, max_length=16) for words in (WORDS, [*WORDS, "left", "new"]))
        assert first("red circle, left")["input_ids"][1:-1] == second("red circle, left")["input_ids"][1:-1]

    @pytest.mark.parametrize("text", ["ünïcode", "中文 🙂", "42 zebras!", "it's bored-red"])
    def test_any_other_text_falls_back_to_bytes(self, text):
        tokenizer = word_tokenizer(WORDS, max_length=16)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.eos_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")

    def test_start_and_end_are_the_last_ids(self):
        tokenizer = word_tokenizer(WORDS, max_length=16)
        assert tokenizer.convert_tokens_to_ids([START, END]) == [len(tokenizer) - 2, len(tokenizer) - 1]
        assert tokenizer("red")["input_ids"][0] == len(tokenizer) - 2
        assert tokenizer.model_max_length == 16

    def test_capital_letters_do_not_matter(self):
        tokenizer = word_tokenizer(WORDS, max_length=16)
        assert tokenizer("CAFÉ Red")["input_ids"] == tokenizer("café red")["input_ids"]

    @pytest.mark.parametrize("word", ["t-shirt", "42", "two words", ""])
    def test_a_word_that_clip_would_split_is_refused(self, word):
        with pytest.raises(ValueError, match=f"words: {word!r} cannot be one token"):
            word_tokenizer([*WORDS, word], max_length=16)


class TestPhrases:
    @pytest.mark.parametrize("name", ["one", "two"])
    def test_trimmed_equals_padded(self, name, request):
        towers = request.getfixturevalue(name)
        trimmed, padded = towers.encode_phrases(PHRASES), towers.encode_phrases(PHRASES, padded=True)
        assert trimmed.last_hidden.shape[1] < padded.last_hidden.shape[1] == 32
        for field in ("last_hidden", "penultimate_hidden"):
            whole = getattr(padded, field)[:, : trimmed.last_hidden.shape[1]]
            torch.testing.assert_close(getattr(trimmed, field)[trimmed.mask], whole[trimmed.mask], atol=1e-5, rtol=0)
        torch.testing.assert_close(trimmed.pooled, padded.pooled, atol=1e-5, rtol=0)
        torch.testing.assert_close(trimmed.lengths, padded.lengths)

    def test_each_distinct_string_is_encoded_once(self, two):
        seen = []
        hooks = [
            part.encoder.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
            )
            for part in two.towers
        ]
        try:
            features = two.encode_phrases(PHRASES)
        finally:
            for hook in hooks:
                hook.remove()
        longest = features.lengths.max().item()
        assert seen == [(4, longest), (4, longest)]
        assert features.last_hidden.shape == (5, longest, 64)
        torch.testing.assert_close(features.last_hidden[0], features.last_hidden[2], atol=0, rtol=0)
        assert not torch.allclose(features.pooled[0], features.pooled[1])

    def test_a_string_alone_gives_what_it_gives_in_company(self, two):
        together, alone = two.encode_phrases(PHRASES), two.encode_phrases(PHRASES[1:2])
        torch.testing.assert_close(together.last_hidden[1:2, :3], alone.last_hidden, atol=1e-5, rtol=0)
        torch.testing.assert_close(together.projected[1:2], alone.projected, atol=1e-5, rtol=0)

    def test_lengths_count_start_and_end(self, one):
        features = one.encode_phrases(PHRASES)
        assert features.lengths.tolist() == [5, 3, 5, 2, 12]
        assert features.lengths.dtype == torch.int64
        assert features.mask.sum(1).tolist() == [5, 3, 5, 2, 12]
        assert features.mask.shape == features.last_hidden.shape[:2]

    def test_no_strings_give_empty_features(self, two):
        features = two.encode_phrases([])
        assert features.last_hidden.shape[::2] == (0, 64)
        assert features.pooled.shape == (0, 24)
        assert features.projected.shape == (0, 20)
        assert [part.pooled.shape for part in features.towers] == [(0, 24), (0, 40)]

    def test_layers_are_those_of_the_encoder(self):
        part = tower(40, heads=4, projection=20)
        ids = part.tokenizer(PHRASES, padding=True, return_tensors="pt")["input_ids"]
        expected = part.encoder(input_ids=ids, output_hidden_states=True)
        features = TextTowers([part]).encode_phrases(PHRASES)
        torch.testing.assert_close(features.last_hidden, expected.last_hidden_state, atol=1e-5, rtol=0)
        torch.testing.assert_close(features.penultimate_hidden, expected.hidden_states[-2], atol=1e-5, rtol=0)
        torch.testing.assert_close(features.projected, expected.text_embeds, atol=1e-5, rtol=0)
        assert features.towers == ()

    @pytest.mark.parametrize("end", [None, 2, 7], ids=["own", "legacy", "wrong"])
    def test_pooled_is_read_at_the_end_token_whatever_the_config_says(self, end):
        features = TextTowers([tower(24, end=end)]).encode_phrases(PHRASES)
        expected = features.last_hidden[torch.arange(5), features.lengths - 1]
        torch.testing.assert_close(features.pooled, expected, atol=0, rtol=0)
        if end != 7:
            part = tower(24, end=end)
            ids = part.tokenizer(PHRASES, padding=True, return_tensors="pt")["input_ids"]
            torch.testing.assert_close(features.pooled, part.encoder(ids).pooler_output, atol=1e-5, rtol=0)

    def test_two_towers_side_by_side(self, two):
        features = two.encode_phrases(PHRASES)
        first, second = features.towers
        torch.testing.assert_close(features.last_hidden, torch.cat([first.last_hidden, second.last_hidden], -1))
        torch.testing.assert_close(
            features.penultimate_hidden, torch.cat([first.penultimate_hidden, second.penultimate_hidden], -1)
        )
        torch.testing.assert_close(features.pooled, first.pooled)
        torch.testing.assert_close(features.projected, second.projected)
        assert first.projected is None
        assert torch.cat([features.pooled, features.projected], -1).shape == (5, 44)
        assert two.width == 64

    def test_gradients_reach_an_encoder_that_trains(self):
        part = tower(24)
        part.requires_grad_(True)
        TextTowers([part]).encode_phrases(PHRASES).last_hidden.sum().backward()
        assert part.encoder.get_input_embeddings().weight.grad.abs().sum() > 0


class TestLongText:
    def test_is_cut_counted_and_said_once(self):
        towers = TextTowers([tower(24, max_length=8), tower(40, heads=4, max_length=8)])
        long = "red " * 20
        with pytest.warns(UserWarning, match="longer than 8 tokens") as said:
            features = towers.encode_phrases(["red", long, long])
        assert len(said) == 1
        assert towers.truncated == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            towers.encode_captions([long])
        assert towers.truncated == 3
        assert features.lengths.tolist() == [3, 8, 8]
        torch.testing.assert_close(features.pooled[1], features.last_hidden[1, 7, :24])

    def test_of_exactly_the_length_is_kept(self):
        towers = TextTowers([tower(24, max_length=8)])
        assert towers.encode_phrases(["red " * 6]).lengths.tolist() == [8]
        assert towers.truncated == 0


class TestPhraseCache:
    """Two towers, as the fixture `two`, that keep phrases."""

    @pytest.fixture
    def calls(self):
        return []

    @pytest.fixture
    def keeping(self, calls):
        def build(tokens):
            torch.manual_seed(0)
            towers = TextTowers([tower(24), tower(40, projection=16)], phrase_cache=tokens).eval().requires_grad_(False)
            towers.each[0].encoder.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
            )
            return towers

        return build

    def test_gives_what_encoding_gives(self, keeping):
        kept, plain = keeping(100), keeping(0)
        for asked in (["red circle", "orange"], ["orange", "a red left circle", "orange"], ["red circle"]):
            one, other = kept.encode_phrases(asked), plain.encode_phrases(asked)
            assert torch.equal(one.mask, other.mask)
            torch.testing.assert_close(one.pooled, other.pooled)
            torch.testing.assert_close(one.projected, other.projected)
            mask = one.mask[..., None]
            torch.testing.assert_close(one.last_hidden * mask, other.last_hidden * mask)
            torch.testing.assert_close(one.penultimate_hidden * mask, other.penultimate_hidden * mask)

    def test_encodes_a_phrase_once(self, keeping, calls):
        towers = keeping(100)
        towers.encode_phrases(["red", "orange", "red"])
        towers.encode_phrases(["orange", "range"])
        towers.encode_phrases(["range", "red"])
        assert calls == [2, 1]

    def test_forgets_the_longest_unused(self, keeping, calls):
        towers = keeping(9)  # three phrases of a word with start and end
        for phrase in ("red", "orange", "range", "red", "circle", "orange"):
            towers.encode_phrases([phrase])
        assert calls == [1, 1, 1, 1, 1]  # red was used again and stayed, orange went for circle

    def test_one_call_may_need_more_than_is_kept(self, keeping, calls):
        towers = keeping(3)
        assert towers.encode_phrases(["red", "orange", "range"]).lengths.tolist() == [3, 3, 3]
        towers.encode_phrases(["circle"])
        towers.encode_phrases(["range"])
        assert calls == [3, 1, 1]

    def test_other_weights_make_it_forget(self, keeping, calls):
        towers = keeping(100)
        before = towers.encode_phrases(["red"]).pooled
        towers.load_state_dict({key: value + 0.1 for key, value in towers.state_dict().items()})
        assert not torch.allclose(before, towers.encode_phrases(["red"]).pooled)
        towers.double()
        assert towers.encode_phrases(["red"]).pooled.dtype == torch.float64
        assert calls == [1, 1, 1]

    def test_an_encoder_that_trains_keeps_nothing(self, keeping, calls):
        towers = keeping(100).requires_grad_(True)
        towers.encode_phrases(["red"])
        assert towers.encode_phrases(["red"]).pooled.requires_grad
        assert calls == [1, 1]

    def test_what_was_kept_in_inference_can_be_trained_on(self, keeping):
        towers = keeping(100)
        with torch.inference_mode():
            towers.encode_phrases(["red", "orange"])
        layer = torch.nn.Linear(24, 1)
        layer(towers.encode_phrases(["red", "orange"]).pooled).sum().backward()
        assert layer.weight.grad.abs().sum() > 0

    def test_a_long_phrase_counts_each_time(self):
        towers = TextTowers([tower(24, max_length=8)], phrase_cache=100).requires_grad_(False)
        with pytest.warns(UserWarning, match="longer than 8 tokens"):
            towers.encode_phrases(["red " * 9])
        towers.encode_phrases(["red " * 9, "red " * 9, "orange"])
        assert towers.truncated == 3


class TestCaptions:
    def test_are_padded_to_the_tokenizers_length(self, one):
        prompt = one.encode_captions(PHRASES)
        assert prompt.tokens.shape == (5, 32, 24)
        assert prompt.pooled is None
        torch.testing.assert_close(prompt.tokens, one.encode_phrases(PHRASES, padded=True).last_hidden)

    def test_are_read_from_the_penultimate_layer_with_a_pooled_vector(self, two):
        prompt, features = two.encode_captions(PHRASES), two.encode_phrases(PHRASES, padded=True)
        torch.testing.assert_close(prompt.tokens, features.penultimate_hidden)
        torch.testing.assert_close(prompt.pooled, features.projected)

    def test_are_padded_with_each_tokenizers_own_token(self, two):
        seen = []
        hooks = [
            part.encoder.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["input_ids"][0, -1].item()), with_kwargs=True
            )
            for part in two.towers
        ]
        two.encode_captions(["red"])
        for hook in hooks:
            hook.remove()
        assert seen == [
            part.tokenizer.convert_tokens_to_ids(text) for part, text in zip(two.towers, (END, "!"), strict=True)
        ]


class TestRefusals:
    def test_a_tokenizer_longer_than_the_encoders_positions(self):
        part = tower(24, max_length=8)
        with pytest.raises(ValueError, match=r"model_max_length: 9 is more than the text encoder's 8 positions"):
            TextTower(word_tokenizer(WORDS, max_length=9), part.encoder)

    def test_a_tokenizer_with_more_tokens_than_the_encoder(self):
        part = tower(24)
        with pytest.raises(ValueError, match="vocab_size"):
            TextTower(word_tokenizer([*WORDS, "elephant"], max_length=32), part.encoder)

    def test_towers_of_different_lengths(self):
        with pytest.raises(ValueError, match=r"towers: lengths \[32, 16\] differ"):
            TextTowers([tower(24), tower(24, max_length=16)])

    def test_an_unknown_caption_layer(self):
        with pytest.raises(ValueError, match="caption_layer: 'middle'"):
            TextTowers([tower(24)], caption_layer="middle")

    def test_a_pooled_caption_without_a_projection(self):
        with pytest.raises(ValueError, match="caption_pooled"):
            TextTowers([tower(24)], caption_pooled=True)


class TestRead:
    """Strings read end to end, as the fixtures `one` and `two`, against each by itself."""

    STRINGS = ("a red circle", "orange", "", "zebra, left of an orange", "a red circle of an orange", "a red")

    @pytest.mark.parametrize("name", ["one", "two"])
    def test_gives_what_each_string_gives_by_itself(self, name, request):
        towers = request.getfixturevalue(name)
        tokens = towers.read([*self.STRINGS, "orange"])
        assert list(tokens.spans) == list(self.STRINGS)
        for number, string in enumerate(self.STRINGS):
            alone = towers.encode_phrases([string])
            own = alone.last_hidden if name == "one" else alone.penultimate_hidden
            begin, end = tokens.spans[string]
            torch.testing.assert_close(tokens.hidden[begin:end], own[0], atol=1e-5, rtol=1e-5)
            if name == "two":
                torch.testing.assert_close(tokens.pooled[number], alone.projected[0], atol=1e-5, rtol=1e-5)
        assert (tokens.pooled is None) == (name == "one")
        assert end == len(tokens.hidden)

    def test_takes_one_call_of_each_encoder_and_shares_beginnings(self, two):
        calls = []
        hooks = [
            part.encoder.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
            )
            for part in two.towers
        ]
        two.read(["a red circle", "a red circle", "a red", "orange"])
        for hook in hooks:
            hook.remove()
        assert calls == [8, 8]  # start, a, red, circle, three ends, orange

    def test_keeps_phrases_for_both_ways_of_reading_but_not_what_is_read_once(self):
        towers = TextTowers([tower(24)], phrase_cache=100).requires_grad_(False)
        calls = []
        towers.each[0].encoder.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[0]), with_kwargs=True
        )
        first = towers.read(["red", "a red circle of an orange"], once=["a red circle of an orange"])
        again = towers.read(["red"])
        begin, end = first.spans["red"]
        assert torch.equal(again.hidden, first.hidden[begin:end])
        torch.testing.assert_close(towers.encode_phrases(["red"]).last_hidden[0], again.hidden)
        assert len(calls) == 1
        towers.read(["a red circle of an orange"])
        assert len(calls) == 2
        towers.encode_phrases(["orange"])
        towers.read(["orange", "red"])
        assert len(calls) == 3

    def test_long_strings_are_cut_keep_their_end_and_are_counted(self):
        for cache in (0, 100):
            towers = TextTowers([tower(24, max_length=8)], phrase_cache=cache).requires_grad_(False)
            with pytest.warns(UserWarning, match="longer than 8 tokens"):
                tokens = towers.read(["red " * 9, "orange"])
            assert tokens.cut == {"red " * 9: 3}
            torch.testing.assert_close(
                tokens.hidden[:8], towers.encode_phrases(["red " * 9]).last_hidden[0], atol=1e-5, rtol=1e-5
            )
            assert towers.read(["red " * 9]).cut == {"red " * 9: 3}
            assert towers.truncated == 3

    def test_an_encoder_that_trains_gets_gradients(self, one):
        weight = one.each[0].encoder.get_input_embeddings().weight.requires_grad_(True)
        try:
            one.read(["a red", "orange"]).hidden.square().sum().backward()
            assert weight.grad.abs().sum() > 0
        finally:
            weight.requires_grad_(False)
            weight.grad = None

    def test_nothing_is_nothing(self, one):
        assert one.read([]).spans == {}

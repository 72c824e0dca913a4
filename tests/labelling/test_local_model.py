"""A model of transformers on this machine: a tiny LLaVA with random weights, saved and opened as any other."""

import numpy as np
import pytest
import torch
import transformers as hf

from labelling.local_model import LocalModel
from labelling.parts import PartMissing
from labelling.vision_language import NoAnswer, Question
from tests.labelling.conftest import words_tokenizer

WORDS = (
    "what is this ? a red blue green old tall house dog tree lake sky near on under of stone USER ASSISTANT :".split()
)
TEMPLATE = (
    "{% for message in messages %}USER : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT : {% endif %}"
)
PICTURES = np.random.default_rng(0).integers(0, 255, (3, 10, 14, 3), dtype=np.uint8)
PROMPT = "what is this ?"
QUESTIONS = [Question(picture=picture, prompt=PROMPT) for picture in PICTURES]
SEED = 5


def tokenizer():
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    made = words_tokenizer(["<image>", *WORDS], unknown="<unk>", **names)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def saved(path, *, seed):
    """A model with random weights in a folder, with its processor."""
    words, side, patch = tokenizer(), 28, 14
    shared = {"num_hidden_layers": 2, "image_size": side, "patch_size": patch}
    vision = hf.CLIPVisionConfig(**shared, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes |= {"num_key_value_heads": 3, "initializer_range": 0.6}  # with less it says one word for ever
    text = hf.LlamaConfig(vocab_size=len(words), **sizes, **ids)
    torch.manual_seed(seed)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    network = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # neither padding nor pictures are words, and an answer ends
        network.lm_head.weight[[0, 1, 3, 4]] = -10 * network.lm_head.weight[2].sign()
    network.generation_config.eos_token_id = [2, *range(20, 26)]
    network.save_pretrained(path)
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=words,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose answers to the three pictures end, and are not all the same."""
    return saved(tmp_path_factory.mktemp("llava"), seed=SEED)


def local(folder, **settings):
    return LocalModel(**{"model": folder, "dtype": "float32", "max_tokens": 40, **settings}).to("cpu")


def test_it_answers_in_its_own_words_and_counts_tokens(folder):
    model = local(folder)
    answers = [model.ask(picture, PROMPT) for picture in PICTURES]
    assert len({answer.text for answer in answers}) > 1  # it looks at the picture
    for answer in answers:
        assert set(answer.text.split()) <= set(WORDS)
        # USER : <image> (four patches) what is this ? ASSISTANT :
        assert answer.tokens_in == 2 + 4 + 4 + 2
        assert 1 <= answer.tokens_out <= 40
    assert model.ask(None, PROMPT).tokens_in == 8
    assert [local(folder).ask(picture, PROMPT) for picture in PICTURES] == answers


def test_answers_by_chance_depend_on_the_question_and_the_seed_alone(folder):
    model = local(folder, temperature=1.5)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    forward = model.ask_all(QUESTIONS)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert local(folder, temperature=1.5).ask_all(QUESTIONS[::-1])[::-1] == forward
    others = [local(folder, temperature=1.5, seed=seed).ask_all(QUESTIONS) for seed in range(1, 4)]
    assert any(other != forward for other in others)


def test_an_answer_that_does_not_end_is_a_failure(folder):
    most = max(answer.tokens_out for answer in local(folder).ask_all(QUESTIONS)) - 1
    model = local(folder, max_tokens=most)
    cut = [outcome for outcome in model.ask_all(QUESTIONS) if isinstance(outcome, NoAnswer)]
    assert f"max_tokens={most}" in str(cut[0])
    assert model.account.failures["cut answer"] == len(cut)


def test_answers_are_kept_without_the_model(folder, tmp_path):
    first = local(folder, cache=str(tmp_path)).ask(PICTURES[0], PROMPT)
    unopened = LocalModel(model=folder, dtype="float32", max_tokens=40, cache=str(tmp_path))
    assert unopened.ask(PICTURES[0], PROMPT).text == first.text
    assert unopened.account.cached == 1


def test_what_is_no_such_model_is_missing(tmp_path, folder):
    with pytest.raises(PartMissing, match=f"model={tmp_path}") as caught:
        local(str(tmp_path))
    assert "\n" not in str(caught.value)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PartMissing, match=f"model={tmp_path}"):
        local(str(tmp_path))

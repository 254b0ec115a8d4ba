"""The text side as a user of the installed package meets it."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from versvideo.models.text import (
    build_clip,
    embed_frames,
    embed_text,
    encode_text,
    load_clip,
    preprocess_frames,
    save_clip,
    split_clip,
)
from versvideo.models.tokenizer import (
    build_tokenizer,
    drop_words,
    known_words,
    tokenize,
    unknown_words,
)
from versvideo.trainers.objectives import clip_loss, clip_objective, label_rows, retrieval_accuracy

CAPTIONS = ["a red circle moving left", "a red circle moving right",
            "the blue square spins on a navy background"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([*CAPTIONS, "goes"], max_length=16)


@pytest.fixture
def clip(tokenizer):
    torch.manual_seed(0)
    return build_clip(tokenizer, "smoke").eval()


def test_tokenizer_round_trip_keeps_everything(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*CAPTIONS, "", "A ZEBRA, red!", "red " * 50]
    assert torch.equal(tokenize(again, texts), tokenize(tokenizer, texts))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert unknown_words(again, "red Zebra") == ["Zebra"]
    assert known_words(again) == known_words(tokenizer)


def test_unknown_words_are_not_changed_by_earlier_truncation(tokenizer):
    tokenize(tokenizer, "red " * 50)
    assert unknown_words(tokenizer, "red " * 50 + "zebra") == ["zebra"]


@pytest.mark.parametrize(
    "prompt", ["", " ", "...", "red" * 300, "<eos>", "日本 🎈", "a\nred\tcircle"])
def test_any_prompt_becomes_finite_conditions(clip, tokenizer, prompt):
    tokens = encode_text(clip.text_model, tokenizer, prompt)
    assert tokens.shape == (1, 16, 32) and tokens.isfinite().all()


def test_conditions_do_not_depend_on_the_batch(clip, tokenizer):
    together = encode_text(clip.text_model, tokenizer, ["", *CAPTIONS])
    for row, prompt in zip(together, ["", *CAPTIONS], strict=True):
        assert torch.allclose(row, encode_text(clip.text_model, tokenizer, prompt)[0], atol=1e-5)


def test_conditions_equal_stable_diffusions(clip, tokenizer):
    from diffusers import StableDiffusionPipeline

    plain = CLIPTextModel(clip.config.text_config)
    plain.load_state_dict(clip.text_model.state_dict())
    pipe = StableDiffusionPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=plain.eval(), tokenizer=tokenizer,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    theirs, empty = pipe.encode_prompt(CAPTIONS, "cpu", 1, True)
    text_encoder, _ = split_clip(clip)
    assert torch.allclose(encode_text(text_encoder, tokenizer, CAPTIONS), theirs, atol=1e-6)
    assert torch.allclose(encode_text(text_encoder, tokenizer, [""] * 3), empty, atol=1e-6)


def test_sentence_is_pooled_at_its_end_and_not_at_its_largest_id(clip, tokenizer):
    text_encoder, _ = split_clip(clip)
    with torch.no_grad():
        out = text_encoder(input_ids=tokenize(tokenizer, CAPTIONS))
    for i, caption in enumerate(CAPTIONS):
        pooled = text_encoder.text_projection(out.last_hidden_state[i, len(caption.split()) + 1])
        assert torch.allclose(out.text_embeds[i], pooled, atol=1e-5)
    assert clip.config.text_config.eos_token_id == tokenizer.eos_token_id != 2


def test_loss_equals_its_definition():
    torch.manual_seed(0)
    left, right = F.normalize(torch.randn(2, 6, 8), dim=-1)
    labels, total = torch.tensor([0, 1, 0, 2, 1, 0]), 0.0
    for a, b in ((left, right), (right, left)):
        for i in range(6):
            log_p = (5.0 * a[i] @ b.T).log_softmax(0)
            right_ones = [j for j in range(6) if labels[j] == labels[i]]
            total -= sum(log_p[j] for j in right_ones) / len(right_ones)
    assert torch.allclose(clip_loss(left, right, 5.0, labels), total / 12, atol=1e-5)


def test_dropped_words_are_reproducible_and_never_special(tokenizer):
    ids = tokenize(tokenizer, CAPTIONS)
    draws = [drop_words(ids, 0.5, tokenizer, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    changed = draws[0] != ids
    assert (draws[0][changed] == tokenizer.unk_token_id).all()
    assert not torch.isin(ids[changed], torch.tensor(tokenizer.all_special_ids)).any()


def test_paraphrases_keep_motion_that_no_frame_shows(tokenizer):
    """Equal looks, different motion: other wordings still find their own motion."""
    torch.manual_seed(0)
    clip = build_clip(tokenizer, "smoke").train()
    others = ["the red circle goes left", "the red circle goes right"]
    ids = tokenize(tokenizer, CAPTIONS[:2])
    batch = {"pixels": torch.randn(1, 3, 64, 64).expand(2, -1, -1, -1), "captions": ids,
             "first": ids, "second": tokenize(tokenizer, others),
             "looks": label_rows(["red circle"] * 2), "scenes": label_rows(["left", "right"])}
    optimizer = torch.optim.AdamW(clip.parameters(), 3e-3)
    first = clip_objective(clip, batch)["paraphrase"].item()
    for _ in range(60):
        optimizer.zero_grad()
        losses = clip_objective(clip, batch)
        losses["loss"].backward()
        optimizer.step()
    assert losses["paraphrase"] < 0.1 * first
    text_encoder, _ = split_clip(clip)
    a = embed_text(text_encoder, tokenizer, CAPTIONS[:2])
    b = embed_text(text_encoder, tokenizer, others)
    assert retrieval_accuracy(a, b, among=2) == 1.0


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (100, 70), (33, 33)])
def test_frames_are_prepared_as_clip_prepares_them(shape):
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor

    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 3, 6, 6), shape, mode="bicubic").clamp(0, 1)
    smooth = smooth.mul(255).byte()
    theirs = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3,
        image_std=[0.5] * 3)(images=list(smooth), return_tensors="pt").pixel_values
    ours = preprocess_frames(smooth[:, :, None], 64)[:, :, 0]
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_towers_are_the_trained_ones(clip, tokenizer, tmp_path, dtype):
    (tmp_path / "unet").mkdir()
    save_clip(tmp_path, clip, tokenizer, dtype)
    text_encoder, image_encoder, again = load_clip(tmp_path)
    whole = clip.state_dict()
    seen = {"logit_scale"}
    for tower in (text_encoder, image_encoder):
        for key, value in tower.state_dict().items():
            assert torch.equal(value, whole[key].to(dtype).float()), key
            seen.add(key)
    assert seen == set(whole)
    assert clip.dtype == torch.float32
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["image_encoder", "text_encoder", "tokenizer", "unet"]
    assert "architectures" in json.loads((tmp_path / "text_encoder/config.json").read_text())
    clips = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    score = embed_frames(image_encoder, clips) @ embed_text(text_encoder, again, CAPTIONS).T
    assert score.shape == (2, 3, 3) and score.abs().max() <= 1.0001


def test_text_encoder_folder_loads_in_plain_transformers(clip, tokenizer, tmp_path):
    save_clip(tmp_path, clip, tokenizer)
    theirs = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder")
    ours = encode_text(clip.text_model, tokenizer, CAPTIONS)
    assert torch.equal(encode_text(theirs, tokenizer, CAPTIONS), ours)


@pytest.mark.parametrize("part", ["text_encoder", "image_encoder", "tokenizer"])
def test_missing_and_damaged_parts_are_named(clip, tokenizer, tmp_path, part):
    save_clip(tmp_path, clip, tokenizer)
    file = tmp_path / part / ("tokenizer.json" if part == "tokenizer" else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(OSError, match=part):
        load_clip(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match=part):
        load_clip(tmp_path)
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=part):
        load_clip(tmp_path)


@pytest.mark.parametrize("size", ["S", "L", "H"])
def test_large_sizes_have_nothing_to_train(tokenizer, size):
    with pytest.raises(ValueError, match="public pretrained CLIP"):
        build_clip(tokenizer, size)


def test_bad_input_is_named(tokenizer, clip):
    with pytest.raises(TypeError, match="prompts="):
        tokenize(tokenizer, None)
    with pytest.raises(ValueError, match="prompts is empty"):
        encode_text(clip.text_model, tokenizer, [])
    with pytest.raises(ValueError, match="size='XXL' is unknown"):
        build_clip(tokenizer, "XXL")
    with pytest.raises(ValueError, match="b 3 t h w"):
        preprocess_frames(torch.zeros(1, 1, 4, 8, 8), 64)

"""Pixels and ids are those of the folder's own processor and chat template, or it is refused."""

import json

import numpy as np
import pytest
import torch
from bad_models import WEIGHTS, copy_model, plan_error, said_by, write_recipe
from PIL import Image
from processors import write_llava_next_processor, write_phi
from reference_llava_next import CLIP, GRIDS, IMAGE_TOKEN, TEXTS
from tiny_tokenizers import write_llama

from nemo_vlm_ptq.data.images import open_image
from nemo_vlm_ptq.families import llava, llava_next, phi, read_config

QUESTION = "What color is it?"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def random_image(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def change_json(path, **values):
    content = json.loads(path.read_text()) | values
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content))


@pytest.fixture
def model(tmp_path):
    return copy_model(tmp_path / "model")


def own_processor(folder):
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return LlavaProcessor.from_pretrained(
        folder,
        image_processor=image_processor,
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


PROCESSORS = {
    "CLIP": {},
    "CLIP of transformers 4": {"image_processor_type": "CLIPImageProcessorFast"},
    "feature extractor": {
        "image_processor_type": None,
        "feature_extractor_type": "CLIPFeatureExtractor",
    },
    "no name": {"image_processor_type": None, "do_pad": True},
    "padded": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "cropped": {"image_processor_type": "LlavaImageProcessor"},
    "stretched": {"size": {"height": 64, "width": 64}, "do_center_crop": False},
    "not normalized": {"do_normalize": False},
    "nearest": {"resample": 0},
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_those_of_the_image_processor_that_the_folder_names(model, case):
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    change_json(model / "preprocessor_config.json", **PROCESSORS[case])
    preprocess = llava.make_preprocessor(model, read_config(model))
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    for size in ((90, 40), (30, 77), (64, 64)):
        ours = preprocess("q", QUESTION, random_image(*size)).images.pixel_values
        theirs = processor(random_image(*size), return_tensors="pt")["pixel_values"]
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["ViTImageProcessor", "SiglipImageProcessor", "Own", "x" * 300])
def test_another_image_processor_is_refused_by_name(tmp_path, model, name):
    change_json(model / "preprocessor_config.json", image_processor_type=name)
    said = plan_error(tmp_path, model)
    assert name in said and "supported: LlavaImageProcessor, CLIPImageProcessor" in said


def write_template(folder, where, template):
    """Write a chat template where transformers looks for one."""
    if where == "chat_template.jinja":
        (folder / where).write_text(template)
    elif where == "chat_template.json":
        (folder / where).write_text(json.dumps({"chat_template": template}))
    else:
        change_json(folder / where, chat_template=template)


@pytest.mark.parametrize(
    "where",
    [
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer_config.json",
        "processor_config.json",
    ],
)
@pytest.mark.parametrize("template", [CHATML, PARTS, LLAMA_3], ids=["chatml", "parts", "llama 3"])
def test_the_prompt_is_rendered_with_the_chat_template_of_the_folder(model, where, template):
    write_template(model, where, template)
    processor = own_processor(model)
    preprocess = llava.make_preprocessor(model, read_config(model))
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    content = parts if template == PARTS else f"<image>\n{QUESTION}"
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    image = random_image(64, 64)
    special = not text.startswith("<s>")
    theirs = processor(text=text, images=image, add_special_tokens=special, return_tensors="pt")
    sample = preprocess("q", QUESTION, image)
    assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
    if template != PARTS and where != "tokenizer_config.json":
        assert processor.chat_template == template
    answered = preprocess("q", QUESTION, sample.images, "red").input_ids.tolist()
    joint = "" if text.endswith("\n") else " "
    own = processor(
        text=text + joint + "red", images=image, add_special_tokens=special, return_tensors="pt"
    )
    assert answered == own["input_ids"][0].tolist()
    assert not preprocess("q", QUESTION).is_image.any()


def test_a_template_that_writes_the_image_itself_gets_the_question_alone(model):
    template = "{% for m in messages %}USER: <image>\n{{ m['content'] }} ASSISTANT:{% endfor %}"
    write_template(model, "chat_template.jinja", template)
    preprocess = llava.make_preprocessor(model, read_config(model))
    assert int(preprocess("q", QUESTION, random_image(64, 64)).is_image.sum()) == 64


@pytest.mark.parametrize(
    "template", ["{{ nothing.here.at_all }}", "{% for %}", "hello", "{{ raise_exception('no') }}"]
)
def test_a_chat_template_that_renders_no_question_is_refused(tmp_path, model, template):
    write_template(model, "chat_template.jinja", template)
    said = plan_error(tmp_path, model)
    assert said.startswith(f"{model}/chat_template.jinja: the chat template cannot be used: ")


def test_several_chat_templates_without_a_default_are_refused(tmp_path, model):
    named = [{"name": "rag", "template": CHATML}, {"name": "tools", "template": CHATML}]
    write_template(model, "tokenizer_config.json", named)
    assert "must be one template, or have one named default" in plan_error(tmp_path, model)


def test_llava_next_and_phi_render_their_chat_templates(tmp_path):
    folder = tmp_path / "next"
    write_llama(folder, ["<image>"])
    write_llava_next_processor(folder)
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "text_config": TEXTS["llama"],
        "vision_config": CLIP,
        "image_grid_pinpoints": GRIDS,
        "image_token_index": IMAGE_TOKEN,
    }
    write_template(folder, "chat_template.jinja", CHATML)
    (folder / "config.json").write_text(json.dumps(config))
    sample = llava_next.make_preprocessor(folder, config)("q", QUESTION, random_image(50, 30))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    found = sample.input_ids.tolist()
    count = found.count(IMAGE_TOKEN)
    at = ids.index(IMAGE_TOKEN)
    assert count > 1 and found == ids[:at] + [IMAGE_TOKEN] * count + ids[at + 1 :]
    grids = [[1, 2]]
    said = said_by(llava_next.make_preprocessor, folder, config | {"image_grid_pinpoints": grids})
    assert "image_grid_pinpoints of the image processor are not those of config.json" in said
    folder = tmp_path / "phi"
    write_phi(folder)
    config = read_config(folder)
    plain = phi.make_preprocessor(folder, config)("q", QUESTION, random_image(50, 30), "red")
    published = (
        "{% for m in messages %}{{'<|' + m['role'] + '|>' + '\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{- '<|assistant|>\n' -}}{% endif %}"
    )
    write_template(folder, "tokenizer_config.json", published)
    again = phi.make_preprocessor(folder, config)("q", QUESTION, random_image(50, 30), "red")
    assert torch.equal(plain.input_ids, again.input_ids)
    write_template(folder, "tokenizer_config.json", CHATML)
    other = phi.make_preprocessor(folder, config)("q", QUESTION, random_image(50, 30), "red")
    assert not torch.equal(plain.input_ids, other.input_ids)


def test_pictures_are_what_transformers_loads(tmp_path):
    from transformers.image_utils import load_image

    images = tmp_path / "images"
    images.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    random_image(40, 20).save(images / "turned.jpg", exif=turned)
    clear = np.dstack([np.asarray(random_image(20, 20)), np.arange(400).reshape(20, 20) % 256])
    Image.fromarray(clear.astype(np.uint8), "RGBA").save(images / "clear.png")
    random_image(20, 20).convert("P").save(images / "palette.png", transparency=3)
    random_image(20, 20).convert("1").save(images / "bit.png")
    random_image(20, 20).convert("CMYK").save(images / "print.jpg")
    random_image(20, 20).save(images / "other.webp")
    for path in images.iterdir():
        ours, theirs = open_image(tmp_path, path.stem), load_image(str(path))
        assert ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert open_image(tmp_path, "turned").size == (20, 40)


def test_pictures_of_more_than_8_bits_are_refused_by_name(tmp_path):
    (tmp_path / "images").mkdir()
    values = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "images" / "x.png")
    said = said_by(open_image, tmp_path, "x")
    assert said.startswith(f"{tmp_path}/images/x.png has 16 or 32 bits a pixel")


def test_the_weights_are_those_that_transformers_reads(tmp_path, model):
    from safetensors.torch import load_file, save_file

    from nemo_vlm_ptq.checkpoints.huggingface import list_tensors

    tensors = load_file(model / WEIGHTS)
    stale = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(stale, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    found = list_tensors(model, llava.FAMILY.name_aliases)
    assert {tensor.file.name for tensor in found.values()} == {WEIGHTS}


def test_what_was_made_with_another_template_or_processor_is_told_apart(tmp_path, model):
    from nemo_vlm_ptq.planning.make_plan import make_plan
    from nemo_vlm_ptq.recipe import load_recipe
    from nemo_vlm_ptq.stages.settings import source_identity

    plan = make_plan(load_recipe(str(write_recipe(tmp_path, model))))
    found = [source_identity(plan)]
    write_template(model, "chat_template.jinja", CHATML)
    found.append(source_identity(plan))
    change_json(model / "preprocessor_config.json", do_pad=True)
    found += [source_identity(plan), source_identity(plan)]
    assert len(set(found)) == 3 and found[2] == found[3]

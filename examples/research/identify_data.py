# SPDX-License-Identifier: Apache-2.0
"""Sentences with their languages for `identify.py`: what is trained on, and test sets that are not.

    python examples/research/identify_data.py --data data --output runs/langid

Reads the public texts below `--data` (`multilingual/`, and `lm/` for English) and writes JSON lines with `text` and `lang`
(ISO 639-3): `train` and `validation`; `tatoeba`, the test sentences of the domain that is trained on; `udhr` and `pud`,
sentences of domains that are not (legal text; news and Wikipedia). `udhr359_train` and `udhr359_test` are the second
setting: 359 languages and variants, the last fifth of each declaration to test on.

Languages without a share in the test (validation) file of Tatoeba give the last tenth (twentieth) of their training
sentences, at most 50 (25). Training sentences whose letters are those of a sentence of another set are left out.
"""

import argparse
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from glob import glob
from pathlib import Path


# Other codes, and those of documents, for languages of Tatoeba.
CODES = dict(
    pair.split("=")
    for pair in (
        "ar=ara be=bel bg=bul bn=ben de=deu el=ell en=eng es=spa fa=pes fr=fra hi=hin hu=hun id=ind it=ita ja=jpn ko=kor "
        "ms=zsm nl=nld pl=pol pt=por ro=ron ru=rus sw=swh ta=tam tr=tur zh-hans=cmn zh-hant=cmn zh=cmn af=afr am=amh xh=xho "
        "fi=fin th=tha cze=ces gre=ell arb=ara azj_cyrl=aze azj_latn=aze pes_2=pes khk=mon lav=lvs als=sqi uzn_latn=uzb "
        "ydd=yid deu_1901=deu cmn_hans=cmn cmn_hant=cmn ell_monotonic=ell ell_polytonic=ell por_BR=por por_PT=por "
        "ron_1953=ron ron_1993=ron srp_cyrl=srp srp_latn=srp bos_cyrl=bos bos_latn=bos tuk_cyrl=tuk tuk_latn=tuk "
        "uig_arab=uig fri=fry prv=oci lnc=oci auv=oci mly_latn=zsm lat_1=lat"
    ).split()
)
MARKUP = re.compile(r"https?:\S+|[`*_#>|]|\[|\]\([^)]*\)|<[^>]*>")
SENTENCE_END = re.compile(r"(?<=[.!?\u2026])[\"'\u00bb\u201d]?\s+|(?<=[\u3002\uff01\uff1f\u0964\u1362])|\n")
TURN = re.compile(r"^(User|Assistant|System): ")
SHORTEST, LONGEST = 10, 200  # characters of a sentence of a document
MOST_OF_A_SOURCE = 600  # sentences of one language in one source


def read_rows(pattern: Path) -> Iterable[dict]:
    files = sorted(glob(str(pattern)))
    if not files:
        raise SystemExit(f"no file matches {pattern}")
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "lang": lang}, ensure_ascii=False) + "\n" for text, lang in rows)
    print(f"{path.name}: {len(rows):,} sentences, {len({lang for _, lang in rows})} languages")


def letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.casefold()))


def sentences(document: str) -> list[str]:
    """Sentences and lines of a document without its markup, mostly of letters."""
    found = (" ".join(part.split()) for part in SENTENCE_END.split(MARKUP.sub("", document)))
    return [text for text in found if SHORTEST <= len(text) <= LONGEST and 1.6 * len(letters(text)) > len(text) - 3]


def spread(items: list, most: int) -> list:
    """At most so many, evenly."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else items


def by_language(rows: Iterable[dict], known: set[str]) -> dict[str, list[str]]:
    """Sentences of documents in known languages."""
    found = defaultdict(list)
    for row in rows:
        lang = CODES.get(row["lang"], row["lang"])
        if lang in known:
            found[lang] += sentences(row["text"])
    return found


def is_foreign(text: str, lang: str, latin: Counter) -> bool:
    """A line of ASCII letters in a language that is not written in Latin: names, code, English."""
    share = sum(map(str.isascii, letters(text))) / max(1, len(letters(text)))
    return share > 0.4 and latin[lang] < 0.1


def latin_share(rows: list[tuple[str, str]]) -> Counter:
    """Share of ASCII letters by language."""
    total, latin = Counter(), Counter()
    for text, lang in rows:
        total[lang] += len(letters(text))
        latin[lang] += sum(map(str.isascii, letters(text)))
    return Counter({lang: latin[lang] / total[lang] for lang in total})


def tatoeba(folder: Path) -> dict[str, list[tuple[str, str]]]:
    sets = {"test": [], "validation": []}
    for split, rows in sets.items():
        rows += [(r["text"], r["lang"]) for r in read_rows(folder / f"{split}.jsonl.gz") if "LASER" in r["source"]]
    train = defaultdict(list)
    for row in read_rows(folder / "train" / "tatoeba_sentences.jsonl.gz"):
        train[row["lang"]].append((row["text"], row["lang"]))
    for split, share, most in (("test", 10, 50), ("validation", 20, 25)):
        given = {lang for _, lang in sets[split]}
        for lang in sorted(set(train) - given):
            cut = len(train[lang]) - min(most, len(train[lang]) // share)
            sets[split] += train[lang][cut:]
            del train[lang][cut:]
    return sets | {"train": [row for lang in sorted(train) for row in train[lang]]}


def english(folder: Path) -> Iterable[Iterable[dict]]:
    """Texts of free licences: stories (CC BY), books (CC0), posts of agencies (public domain), dialogues (CC BY)."""
    for name in ("stories-1", "books-1", "gov_blog-1"):
        yield read_rows(folder / "train" / f"{name}.jsonl.gz")
    rows = read_rows(folder / "train" / "dialogue-1.jsonl.gz")
    yield (row for row in rows if "Taskmaster" in row["source"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with multilingual/ and lm/")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    folder = args.data / "multilingual"
    sets = tatoeba(folder)
    latin = latin_share(sets["train"])
    known = {*latin, "eng"}
    latin["eng"] = 1

    added = []
    for name in ("eltec_novels", "opensource_guide", "african_storybook"):
        found = by_language(read_rows(folder / "train" / f"{name}.jsonl.gz"), known)
        for lang, texts in sorted(found.items()):
            texts = [text for text in texts if not is_foreign(text, lang, latin)]
            added += [(text, lang) for text in spread(texts, MOST_OF_A_SOURCE)]
    for documents in english(args.data / "lm"):
        texts = [TURN.sub("", text) for row in documents for text in sentences(row["text"])]
        rows = [(text, "eng") for text in spread(texts, MOST_OF_A_SOURCE)]
        sets["test"] += rows[-13:]
        added += rows[:-13]
    sets["train"] += added
    declarations = list(read_rows(folder / "train" / "udhr_documents.jsonl.gz"))
    found = by_language(declarations, known)
    sets["udhr"] = [(text, lang) for lang in sorted(found) for text in spread(found[lang], 50)]
    found = defaultdict(list)
    for row in read_rows(folder / "parallel_pud.jsonl.gz"):
        found[CODES.get(row["lang"], row["lang"])].append(row["text"])
    sets["pud"] = [(text, lang) for lang in sorted(found) for text in spread(found[lang], 200)]
    sets |= {"udhr359_train": [], "udhr359_test": []}
    for row in declarations:
        texts = sentences(row["text"])
        cut = len(texts) * 4 // 5
        known = set(map(letters, texts[:cut]))  # of one language: "Artigo 27º" is not new after "Artigo 1º"
        sets["udhr359_train"] += [(text, row["lang"]) for text in texts[:cut]]
        sets["udhr359_test"] += [(t, row["lang"]) for t in spread(texts[cut:], 20) if letters(t) not in known]

    held_out = {letters(text) for name in ("test", "validation", "udhr", "pud") for text, _ in sets[name]}
    kept = [row for row in sets["train"] if letters(row[0]) not in held_out and letters(row[0])]
    print(f"{len(sets['train']) - len(kept):,} training sentences are in another set or without letters")
    sets["train"] = kept
    sets["tatoeba"] = sets.pop("test")
    for name, rows in sets.items():
        write_rows(args.output / f"{name}.jsonl.gz", rows)


if __name__ == "__main__":
    main()

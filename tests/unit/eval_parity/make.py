"""Make expected.json with other implementations, in an environment of their own.

    pip install lm-eval==0.4.13 nltk langdetect immutabledict math-verify scikit-learn scipy
    python tests/unit/eval_parity/make.py

What is taken from where is in `NOTE`, which the file repeats. Not part of the tests: they compare
rayhf's figures with the file.
"""

import json
from pathlib import Path

import nltk
import numpy as np
from nltk.tokenize.punkt import PunktSentenceTokenizer

NOTE = (
    "Made by tests/unit/eval_parity/make.py with lm-eval 0.4.13. gsm8k: its filters strict-match "
    "and flexible-extract and its metric exact_match with the settings of its task gsm8k. math: "
    "math_verify of process_results of its task minerva_math, with math-verify 0.9.0 and ANTLR "
    "4.13 as rayhf has them (with ANTLR 4.11, 50\\% is not read). ifeval: process_results of its "
    "task ifeval. NLTK's trained English sentence model is a download that was not at hand: "
    "number_sentences used NLTK's Punkt tokenizer without training, and word_tokenize was called "
    "with preserve_line. length_controlled: scikit-learn's LogisticRegression without intercept "
    "or penalty on rows that are doubled as AlpacaEval 2.0 doubles them (weight p with target 1, "
    "1 - p with target 0)."
)

GSM8K_TEXTS = [
    "She has 3 + 4 = 7 apples.\n#### 7",
    "#### 1,234",
    "#### $1,234.",
    "The total is $1,234.50.",
    "So it costs 18 dollars.\n#### 18\nWait, no: 20.",
    "no number at all",
    "#### 7 apples",
    "####7",
    "#### -5",
    "The answer is -5.",
    "It is 3.0",
    "First #### 9, then #### 7",
    "Ratio 3:2, so 7",
    "7.",
    "...",
    "",
    "1/2 of 14 is 7 %",
    "$7",
    "She pays $1234",
]
GSM8K_ANSWERS = ["3 + 4 = 7\n#### 7", "long\n#### 1,234", "minus\n#### -5", "#### 18", "#### 3"]

MATH_TEXTS = [
    r"So the answer is $\boxed{\frac{1}{2}}$.",
    r"\boxed{0.5}",
    r"Therefore $x = 0.5$",
    r"\boxed{2}",
    r"\boxed{x^2 + 2x + 1}",
    r"\boxed{(x+1)^2}",
    r"The final answer is $(3, 4)$.",
    r"\boxed{(3,4)}",
    r"\boxed{\{3, 4\}}",
    r"\boxed{50\%}",
    r"we get 24",
    "no answer",
    "",
    r"\boxed{24} \text{ or rather } \boxed{25}",
    r"\boxed{\frac12}",
    r"$\boxed{-\frac{2}{3}}$",
    r"\boxed{24\text{ cm}}",
]
MATH_SOLUTIONS = [
    r"Half: $\boxed{\frac{1}{2}}$.",
    r"It is $\boxed{24}$.",
    r"Expand: $\boxed{x^2 + 2x + 1}$",
    r"The point is $\boxed{(3, 4)}$.",
    r"So $\frac{a}{b} = \boxed{-\frac{2}{3}}$.",
]

ENGLISH = (
    "The quick brown fox jumps over the lazy dog while the children are watching from the window. "
    "It was a bright cold day in April, and the clocks were striking thirteen."
)
GERMAN = (
    "Die Kinder spielen im Garten, während die Großmutter in der Küche einen Kuchen backt. Danach "
    "gehen alle zusammen in den Wald und suchen nach Pilzen."
)
IFEVAL_TEXTS = [
    ENGLISH,
    ENGLISH.upper(),
    ENGLISH.lower(),
    GERMAN,
    "",
    "   \n  ",
    "My answer is yes.",
    "Well. My answer is maybe.\nThat is all",
    '"A quoted answer"',
    'Intro line\n"A quoted answer"',
    "# Title\n<<My poem>>\nRoses are red.",
    "<< >>",
    "* one\n* two\n- three",
    "Points:\n* one\n* two\n- three\nBye",
    "**bold** and *italic* and *another*",
    "SECTION 1\nfirst\nSECTION 2\nsecond",
    '{"a": [1, 2]}',
    '```json\n{"a": 1}\n```',
    'Here you are:\n{"a": 1}',
    "First answer\n******\nSecond answer",
    "Same\n******\nSame",
    "******\nOne\n******\nTwo\n******",
    "a\n******\n\n******\nb",
    "Dear sir\n\nPlease sign.\nP.S. I love cats",
    "Dear sir\n\nPlease sign.\nP.P.S I love cats",
    "One paragraph\n***\nTwo paragraphs\n***\nThree",
    "***\nOne paragraph\n***\nTwo paragraphs",
    "One\n\n***\n\n***\nTwo",
    "Hello there\n\n'Weekend plans, he said\n\nbye",
    "Hello there\n\nWeekend! plans\n\nbye",
    "Fill in [name] and [address] [age]",
    "Write about cats. The CATS are nice, cat and dog. Is there anything else I can help with?",
    'Ends here. "Is there anything else I can help with?"',
    "Write about cats and more text follows",
    "THE NASA TEAM AND I SAW IT, OK. DON'T GO",
    "The NASA and ESA teams met. I can't say WHY it is so.",
    "One. Two! Three? Four... five",
    "Hello world. This is it",
    "no commas here but many words to count in this line of text",
    "Numbers 1, 2, 3 and kkk letters KKK",
]


def _row(*pairs):
    return {
        "prompt": "Write about cats and dogs",
        "instruction_id_list": [name for name, _ in pairs],
        "kwargs": [settings for _, settings in pairs],
    }


IFEVAL_ROWS = [
    _row((name, settings))
    for name, settings in [
        ("keywords:existence", {"keywords": ["cat", "nice"]}),
        ("keywords:frequency", {"keyword": "cat", "frequency": 3, "relation": "at least"}),
        ("keywords:frequency", {"keyword": "cat", "frequency": 3, "relation": "less than"}),
        ("keywords:forbidden_words", {"forbidden_words": ["cats", "fox"]}),
        (
            "keywords:letter_frequency",
            {"letter": "k", "let_frequency": 4, "let_relation": "at least"},
        ),
        (
            "keywords:letter_frequency",
            {"letter": "k", "let_frequency": 4, "let_relation": "less than"},
        ),
        ("language:response_language", {"language": "de"}),
        ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}),
        ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
        ("length_constraints:number_words", {"num_words": 10, "relation": "at least"}),
        ("length_constraints:number_words", {"num_words": 10, "relation": "less than"}),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "weekend"},
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 3}),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
        ("detectable_format:number_bullet_lists", {"num_bullets": 3}),
        ("detectable_format:constrained_response", {}),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 3}),
        ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}),
        ("detectable_format:json_format", {}),
        ("detectable_format:title", {}),
        ("combination:two_responses", {}),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Write about cats"}),
        (
            "startend:end_checker",
            {"end_phrase": "Is there anything else I can help with?"},
        ),
        ("startend:quotation", {}),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 4, "capital_relation": "at least"},
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 4, "capital_relation": "less than"},
        ),
        ("change_case:english_capital", {}),
        ("change_case:english_lowercase", {}),
        ("punctuation:no_comma", {}),
    ]
] + [
    _row(
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"num_words": 5, "relation": "at least"}),
        ("startend:quotation", {}),
    )
]


def gsm8k():
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    strict = RegexFilter(regex_pattern=r"#### (\-?[0-9\.\,]+)")
    flexible = RegexFilter(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    expected = {}
    for name, chosen in (("strict_match", strict), ("flexible_extract", flexible)):
        found = [row[0] for row in chosen.apply([[text] for text in GSM8K_TEXTS], [])]
        expected[name] = [
            [
                int(
                    exact_match_hf_evaluate(
                        predictions=[prediction],
                        references=[answer],
                        regexes_to_ignore=ignored,
                        ignore_case=True,
                    )["exact_match"]
                )
                for prediction in found
            ]
            for answer in GSM8K_ANSWERS
        ]
    return {"texts": GSM8K_TEXTS, "answers": GSM8K_ANSWERS, **expected}


def math():
    from importlib import metadata

    import math_verify  # noqa: F401  it chooses its grammar by the real version

    # The task wants ANTLR 4.11 for exact_match, by SymPy; math-verify reads more with rayhf's 4.13.
    metadata.version = lambda name: "4.11"
    from lm_eval.tasks.minerva_math.utils import process_results

    return {
        "texts": MATH_TEXTS,
        "solutions": MATH_SOLUTIONS,
        "math_verify": [
            [
                process_results({"solution": solution, "answer": ""}, [text])["math_verify"]
                for text in MATH_TEXTS
            ]
            for solution in MATH_SOLUTIONS
        ],
    }


def ifeval():
    nltk.data.find = lambda *_: True  # the module looks for a download when it is imported
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval import instructions_util, utils

    DetectorFactory.seed = 0
    instructions_util._get_sentence_tokenizer = PunktSentenceTokenizer
    tokenize = nltk.word_tokenize
    nltk.word_tokenize = lambda text: tokenize(text, preserve_line=True)
    results = [
        [utils.process_results({"key": 0, **row}, [text]) for text in IFEVAL_TEXTS]
        for row in IFEVAL_ROWS
    ]
    names = ("inst_level_strict_acc", "inst_level_loose_acc")
    return {
        "texts": IFEVAL_TEXTS,
        "rows": IFEVAL_ROWS,
        **{
            name: [["".join(str(int(x)) for x in each[name]) for each in row] for row in results]
            for name in names
        },
    }


def length_controlled():
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(5)
    count = 60
    gap = random.integers(-400, 600, size=count)
    difficulty = random.normal(size=count)
    logit = -0.2 + 0.8 * np.tanh(gap / gap.std(ddof=1)) + 0.5 * difficulty
    win = np.round(1 / (1 + np.exp(-(logit + random.normal(size=count)))), 3)
    expected = {}
    for name, terms in (("without", ()), ("with", (difficulty,))):
        design = np.stack([np.ones(count), np.tanh(gap / gap.std(ddof=1)), *terms], axis=1)
        model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000)
        model.fit(
            np.concatenate([design, design]),
            np.concatenate([np.ones(count), np.zeros(count)]),
            sample_weight=np.concatenate([win, 1 - win]),
        )
        design[:, 1] = 0
        expected[name] = {
            "coefficients": model.coef_[0].tolist(),
            "win_rate": float(model.predict_proba(design)[:, 1].mean()),
        }
    columns = {"gap": gap, "difficulty": difficulty.round(12), "win": win}
    return {**{name: values.tolist() for name, values in columns.items()}, **expected}


if __name__ == "__main__":
    content = {
        "note": NOTE,
        "gsm8k": gsm8k(),
        "math": math(),
        "ifeval": ifeval(),
        "length_controlled": length_controlled(),
    }
    file = Path(__file__).with_name("expected.json")
    parts = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in content.items())
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

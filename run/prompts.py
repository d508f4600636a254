"""GLUE for a decoder-only model: a prompt that the answer continues, and the words of the classes.

Ours; the paper has none. The order of the words is that of the label ids; STS-B's answer is a
number from 0 to 5, as a T5's.
"""

PLAIN = {
    "cola": ("Sentence: {}\nIs it good English?", ("no", "yes")),
    "sst2": ("Review: {}\nSentiment:", ("negative", "positive")),
    "mrpc": ("Sentence 1: {}\nSentence 2: {}\nDo they mean the same?", ("no", "yes")),
    "qqp": ("Question 1: {}\nQuestion 2: {}\nDo they ask the same?", ("no", "yes")),
    "mnli": ("Text: {}\nClaim: {}\nIs the claim true?", ("yes", "maybe", "no")),
    "qnli": ("Question: {}\nText: {}\nDoes the text answer it?", ("yes", "no")),
    "rte": ("Text: {}\nClaim: {}\nIs the claim true?", ("yes", "no")),
    "stsb": ("Sentence 1: {}\nSentence 2: {}\nSimilarity from 0 to 5:", ()),
}

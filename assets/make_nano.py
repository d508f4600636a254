"""Pre-trains the bundled backbone `assets/nano`: a small T5, from nothing, on movie reviews.

    python assets/make_nano.py --text train.jsonl.xz unsup.txt.xz --minutes 60

A text file is .txt (one review a line) or .jsonl ({"text": ..., "label": 0 or 1}), as it is or with .xz behind it.
One job after the other; each leaves its result in --work and is not done again:

    1 vocabulary     spiece.model, SentencePiece unigram, lower-casing; the sentinels come on top, as in T5
    2 packing        every review as piece ids, once; half of them in the style of the Penn Treebank ("it 's", "does n't")
    3 teacher        a bag-of-bigrams classifier labels the reviews that have no label
    4 pre-training   span corruption (15 %, mean length 3) mixed with "imdb sentence: ..." -> "positive" or "negative"

Stop it with Ctrl-C; the same command with --resume goes on.
"""

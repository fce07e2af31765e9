"""Make the demo's conversations out of its comments: a question about a word, and the comment as the answer.

    python demo/make_chat.py demo/comments.jsonl --number 3000 > demo/chat.jsonl

Deterministic, like demo/make_corpus.py: nobody asked or answered any of this.
"""

import argparse
import json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comments", help="JSONL with author and content")
    parser.add_argument("--number", type=int, default=3000, help="conversations: of the first so many comments")
    options = parser.parse_args()
    with open(options.comments, encoding="utf-8") as file:
        for line, _ in zip(file, range(options.number)):
            row = json.loads(line)
            word = max(row["content"].replace(".", " ").replace(",", " ").split(), key=len)
            messages = [
                {"role": "user", "content": f"What do you think about {word.lower()}?"},
                {"role": "assistant", "content": row["content"]},
            ]
            print(json.dumps({"author": row["author"], "messages": messages}))


if __name__ == "__main__":
    main()

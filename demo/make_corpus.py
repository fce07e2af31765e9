"""Make the demo's comments: many authors who write little, each in a style of their own.

    python demo/make_corpus.py --family private --authors 20000 --seed 7 > demo/comments.jsonl

With --topics each comment has its topic, as a label, and as the prompt that it answers ("chess:").

Deterministic: the same options give the same bytes. Two families share the grammar and the habits of writers
but not the topics: the demo's model is pre-trained on the public one (demo/make_model.py) and fine-tuned on the
private one, so that there is something to learn. All of it is synthetic; nobody wrote any of these comments.
"""

import argparse
import json
import random
import sys

# Topic: things, places, what one does with the things (base form, past tense), qualities.
PUBLIC_TOPICS = {
    "cooking": "soup bread sauce oven knife pan recipe dough onion pepper / kitchen market bakery / bake baked, stir stirred, "
    "taste tasted, burn burned / salty crisp fresh sweet",
    "travel": "ticket suitcase passport map train hotel bus guide / station airport harbour / book booked, miss missed, "
    "pack packed, board boarded / cheap crowded late scenic",
    "music": "guitar song drum chorus record album piano melody / studio concert basement / play played, tune tuned, "
    "record recorded, practise practised / loud gentle catchy old",
    "films": "scene actor trailer ending script sequel plot camera / cinema theatre festival / watch watched, skip skipped, "
    "rate rated, review reviewed / boring brilliant long funny",
    "sports": "match goal referee team ball season coach league / stadium pitch gym / win won, lose lost, kick kicked, "
    "train trained / fast unfair close strong",
    "pets": "dog cat leash kitten puppy collar bowl vet / garden park couch / feed fed, walk walked, wash washed, "
    "adopt adopted / lazy hungry tiny noisy",
}
PRIVATE_TOPICS = {
    "cycling": "saddle derailleur chain pedal handlebar helmet sprocket wheel / velodrome hill workshop / tighten tightened, "
    "ride rode, oil oiled, swap swapped / wobbly rusty light squeaky",
    "beekeeping": "hive queen swarm honeycomb smoker frame larva nectar / meadow orchard apiary / inspect inspected, "
    "harvest harvested, move moved, requeen requeened / calm golden buzzing weak",
    "astronomy": "telescope nebula eyepiece galaxy comet mirror tripod lens / observatory ridge desert / observe observed, "
    "align aligned, photograph photographed, track tracked / faint bright distant hazy",
    "woodworking": "chisel plank dovetail lathe varnish sander clamp mallet / shed sawmill attic / carve carved, "
    "glue glued, sand sanded, plane planed / smooth warped knotty sturdy",
    "chess": "bishop gambit endgame knight rook opening pawn clock / tournament library club / sacrifice sacrificed, "
    "castle castled, blunder blundered, defend defended / sharp passive drawn precise",
    "sailing": "mast rudder anchor spinnaker keel rope jib hull / marina lagoon regatta / hoist hoisted, steer steered, "
    "moor moored, repair repaired / windy salty tangled steady",
}
TEMPLATES = [
    "I {past} my {thing} at the {place} and it was {quality}",
    "does anyone know how to {verb} a {quality} {thing}",
    "the {thing} at the {place} is too {quality} for me",
    "never {verb} a {thing} near the {place}",
    "my {thing} got {quality} after I {past} it",
    "if you want a {quality} {thing} just {verb} it twice",
    "yesterday somebody {past} the {thing} in our {place}",
    "a {quality} {thing} is better than a {quality} {thing2}",
]
OPENINGS = ["", "", "", "well, ", "honestly, ", "imo ", "hey all, ", "update: ", "so ", "quick question, "]
ENDINGS = [".", ".", "!", "...", " :)", "!!", ", thanks.", ", cheers", " lol", "?"]
NAMES = "otter heron maple cedar falcon pebble ember willow badger comet thistle raven juniper lynx saffron tundra".split()


def parse_topic(text: str) -> dict[str, list]:
    things, places, verbs, qualities = (part.strip() for part in text.split("/"))
    return {
        "thing": things.split(),
        "place": places.split(),
        "verb": [tuple(pair.split()) for pair in verbs.split(",")],
        "quality": qualities.split(),
    }


def number_of_comments(generator: random.Random) -> int:
    """Heavy-tailed: most authors write once or twice, a few more than a hundred times."""
    return min(200, int(generator.paretovariate(1.6)))


def make_author(generator: random.Random, topics: list[dict]) -> dict:
    """A style: a favourite topic with favourite things in it, few templates, one opening, one ending."""
    topic = generator.choice(topics)
    return {
        "topic": topic,
        "things": generator.sample(topic["thing"], 4),
        "templates": generator.sample(TEMPLATES, 3),
        "opening": generator.choice(OPENINGS),
        "ending": generator.choice(ENDINGS),
        "lower": generator.random() < 0.3,
    }


def make_comment(generator: random.Random, author: dict) -> str:
    topic = author["topic"]
    thing, other = generator.sample(author["things"], 2)
    verb, past = generator.choice(topic["verb"])
    words = {"thing": thing, "thing2": other, "verb": verb, "past": past}
    words["place"], words["quality"] = generator.choice(topic["place"]), generator.choice(topic["quality"])
    text = author["opening"] + generator.choice(author["templates"]).format(**words) + author["ending"]
    return text.lower() if author["lower"] else text[0].upper() + text[1:]


def make_corpus(family: str, authors: int, seed: int) -> list[dict[str, str]]:
    """Return the comments, shuffled, as {"author", "content", "topic"}."""
    generator = random.Random(f"{family} {seed}")
    named = {"public": PUBLIC_TOPICS, "private": PRIVATE_TOPICS}[family]
    topics = [{"name": name, **parse_topic(text)} for name, text in named.items()]
    comments = []
    for i in range(authors):
        author, name = make_author(generator, topics), f"{generator.choice(NAMES)}{i}"
        number, topic = number_of_comments(generator), author["topic"]["name"]
        comments += [{"author": name, "content": make_comment(generator, author), "topic": topic} for _ in range(number)]
    generator.shuffle(comments)
    return comments


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=["public", "private"], default="private")
    parser.add_argument("--authors", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--topics", action="store_true", help="with a column topic, and a column prompt made of it")
    options = parser.parse_args()
    for comment in make_corpus(options.family, options.authors, options.seed):
        topic = comment.pop("topic")
        if options.topics:
            comment |= {"content": f" {comment['content']}", "prompt": f"{topic}:", "topic": topic}
        sys.stdout.write(json.dumps(comment) + "\n")

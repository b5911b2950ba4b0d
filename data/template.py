"""The benchmark's way of asking: an instruction, examples, then the context and the question.

    from data.template import head_text, with_template
    print(head_text("qa1"))                               # all that stands before the context
    document = with_template(document, "qa1", tokenizer)  # of any document with one question

A model that was never trained on our documents learns from the head what it is asked and how an
answer looks. The parts and their order are those of github.com/booydar/babilong
(babilong/prompts.py, Apache-2.0). The words and the stories are our own. There are two differences.
The prompt ends with "Answer:", for a base model, which goes on with a text. And every answer is the
bare label, where the benchmark asks for a sentence in qa1, qa2 and qa3, so that exact match can
count it. Writes nothing.
"""

from typing import NamedTuple

import numpy as np

from data.document import Document
from data.tokenizer import Tokenizer

HEAD = "{instruction}\n\n{examples}\n\n{form}\n\n<context>\n"
EXAMPLE = "<example>\n{facts} {question}\nAnswer: {answer}\n</example>"
TAIL = "\n</context>\n\nQuestion: {question}\nAnswer:"


class Example(NamedTuple):
    """A short story with a question and its answer."""

    facts: str
    question: str
    answer: str


class Prompt(NamedTuple):
    """What a model is told about a task."""

    instruction: str  # what the facts say, and how they answer the question
    examples: tuple[Example, ...]
    form: str  # what an answer looks like


HIDDEN = "The context hides a few facts in other text. Answer the question from the facts alone. "

# The forms of an answer. They name only labels that the benchmark's own prompts name, too.
PLACE = "Answer with one word, the name of a place. Write nothing else."
WORD = "Answer with one word. Write nothing else."
YES_NO = "Answer with one word, yes or no. Write nothing else."
YES_NO_MAYBE = "Answer with one word: yes, no or maybe. Write nothing else."
NUMBER = "Answer with one word, a number or the word none. Write nothing else."
THINGS = (
    "Answer with the name of a thing, with two names and a comma between them, or with the word "
    "nothing. Write nothing else."
)
ANIMAL = "Answer with one word, a kind of animal. Write nothing else."
COLOR = "Answer with one word, a color. Write nothing else."
STEPS = "Answer with two of the letters n, s, e and w and a comma between them. Write nothing else."
FEELING = "Answer with one word, a feeling or the name of a place. Write nothing else."

# The names in the examples are not those of bAbI's stories. Only the animals and colors of qa15 and
# qa16, and the rooms and feelings of qa20, are bAbI's, as these tasks have no others.
PROMPTS = {
    "qa1": Prompt(
        HIDDEN + "The facts say where people go. A person is at the place of the latest move.",
        (
            Example(
                "Alice went to the cellar. Hugo moved to the garage. Alice travelled to the "
                "library.",
                "Where is Alice?",
                "library",
            ),
            Example(
                "Oscar journeyed to the attic. Clara went back to the museum. Oscar went to the "
                "pantry. Clara moved to the garage.",
                "Where is Oscar?",
                "pantry",
            ),
        ),
        PLACE,
    ),
    "qa2": Prompt(
        HIDDEN + "The facts say where people go, and what they take and put down. A thing goes "
        "where its holder goes, and stays where it is put down.",
        (
            Example(
                "Alice took the lantern there. Alice went to the cellar. Hugo moved to the garage.",
                "Where is the lantern?",
                "cellar",
            ),
            Example(
                "Oscar went to the library. Oscar got the kettle there. Oscar moved to the attic. "
                "Oscar put down the kettle. Oscar travelled to the museum.",
                "Where is the kettle?",
                "attic",
            ),
        ),
        PLACE,
    ),
    "qa3": Prompt(
        HIDDEN + "The facts say where people go, and what they take and put down. Tell where the "
        "thing was just before it came to the place in the question.",
        (
            Example(
                "Alice took the lantern there. Alice went to the cellar. Hugo moved to the garage. "
                "Alice travelled to the library.",
                "Where was the lantern before the library?",
                "cellar",
            ),
            Example(
                "Oscar went to the attic. Oscar got the kettle there. Oscar journeyed to the "
                "museum. Oscar put down the kettle. Oscar moved to the garage.",
                "Where was the kettle before the museum?",
                "attic",
            ),
        ),
        PLACE,
    ),
    "qa4": Prompt(
        HIDDEN + "The facts say in which direction one place lies from another.",
        (
            Example(
                "The cellar is north of the garage. The garage is north of the library.",
                "What is north of the garage?",
                "cellar",
            ),
            Example(
                "The museum is west of the attic. The pantry is east of the attic.",
                "What is the attic west of?",
                "pantry",
            ),
        ),
        PLACE,
    ),
    "qa5": Prompt(
        HIDDEN + "The facts say who takes a thing, and who gives it to whom. If there are several "
        "such gifts, the latest counts.",
        (
            Example(
                "Alice took the lantern there. Alice gave the lantern to Hugo. Hugo went to the "
                "cellar.",
                "Who did Alice give the lantern to?",
                "Hugo",
            ),
            Example(
                "Oscar got the kettle there. Felix moved to the attic. Oscar passed the kettle to "
                "Clara.",
                "What did Oscar give to Clara?",
                "kettle",
            ),
        ),
        WORD,
    ),
    "qa6": Prompt(
        HIDDEN + "The facts say where people go. A person is at the place of the latest move.",
        (
            Example(
                "Alice went to the cellar. Hugo moved to the garage. Alice moved to the library.",
                "Is Alice in the library?",
                "yes",
            ),
            Example(
                "Oscar travelled to the attic. Clara went to the garage. Oscar journeyed to the "
                "museum.",
                "Is Oscar in the attic?",
                "no",
            ),
        ),
        YES_NO,
    ),
    "qa7": Prompt(
        HIDDEN + "The facts say what people take, put down and give to each other. Count the "
        "things that the person holds at the end.",
        (
            Example(
                "Alice took the lantern there. Hugo went to the cellar. Alice got the bottle "
                "there.",
                "How many objects is Alice carrying?",
                "two",
            ),
            Example(
                "Oscar picked up the kettle there. Clara grabbed the coin there. Clara gave the "
                "coin to Oscar. Oscar put down the kettle.",
                "How many objects is Oscar carrying?",
                "one",
            ),
        ),
        NUMBER,
    ),
    "qa8": Prompt(
        HIDDEN + "The facts say what people take and put down. Name what the person holds at the "
        "end.",
        (
            Example(
                "Alice took the lantern there. Hugo went to the cellar. Alice got the bottle "
                "there.",
                "What is Alice carrying?",
                "lantern,bottle",
            ),
            Example(
                "Oscar picked up the kettle there. Oscar went to the attic. Oscar dropped the "
                "kettle.",
                "What is Oscar carrying?",
                "nothing",
            ),
        ),
        THINGS,
    ),
    "qa9": Prompt(
        HIDDEN + "The facts say where people are, and where they are not. The latest fact about a "
        "person counts.",
        (
            Example(
                "Alice is in the cellar. Hugo went to the garage.",
                "Is Alice in the cellar?",
                "yes",
            ),
            Example(
                "Clara went to the library. Oscar is in the attic. Clara is no longer in the "
                "library.",
                "Is Clara in the library?",
                "no",
            ),
        ),
        YES_NO,
    ),
    "qa10": Prompt(
        HIDDEN + "The facts say where people are, or that they are at one of two places. The "
        "latest fact about a person counts.",
        (
            Example(
                "Alice is either in the cellar or the attic. Hugo went to the garage.",
                "Is Alice in the attic?",
                "maybe",
            ),
            Example(
                "Clara is in the library. Oscar is either in the museum or the pantry.",
                "Is Clara in the garage?",
                "no",
            ),
        ),
        YES_NO_MAYBE,
    ),
    "qa11": Prompt(
        HIDDEN + "The facts say where people go. The words he and she stand for the person of the "
        "fact before.",
        (
            Example(
                "Alice went to the cellar. After that she moved to the library.",
                "Where is Alice?",
                "library",
            ),
            Example(
                "Oscar travelled to the attic. Then he went to the garage. Clara journeyed to the "
                "museum. Afterwards she went back to the pantry.",
                "Where is Oscar?",
                "garage",
            ),
        ),
        PLACE,
    ),
    "qa12": Prompt(
        HIDDEN + "The facts say where two people go together. A person is at the place of the "
        "latest move.",
        (
            Example(
                "Alice and Hugo went to the cellar. Hugo and Clara moved to the library.",
                "Where is Hugo?",
                "library",
            ),
            Example(
                "Oscar and Clara travelled to the attic. Alice and Felix went to the garage.",
                "Where is Oscar?",
                "attic",
            ),
        ),
        PLACE,
    ),
    "qa13": Prompt(
        HIDDEN + "The facts say where two people go together. The word they stands for the two of "
        "the fact before.",
        (
            Example(
                "Alice and Hugo went to the cellar. Then they moved to the library.",
                "Where is Alice?",
                "library",
            ),
            Example(
                "Oscar and Clara travelled to the attic. After that they went to the museum. Hugo "
                "and Oscar journeyed to the garage. Following that they moved to the pantry.",
                "Where is Clara?",
                "museum",
            ),
        ),
        PLACE,
    ),
    "qa14": Prompt(
        HIDDEN + "The facts say when a person went to a place: yesterday, this morning, this "
        "afternoon or this evening. They are not told in the order of time.",
        (
            Example(
                "Alice moved to the library this morning. Yesterday Alice went to the cellar.",
                "Where was Alice before the library?",
                "cellar",
            ),
            Example(
                "Yesterday Oscar moved to the garage. This afternoon Oscar travelled to the attic. "
                "Oscar went to the museum this morning.",
                "Where was Oscar before the attic?",
                "museum",
            ),
        ),
        PLACE,
    ),
    "qa15": Prompt(
        HIDDEN + "The facts say of what kind an animal is, and which kind is afraid of which. An "
        "animal fears what its kind fears.",
        (
            Example(
                "Cats are afraid of wolves. Mice are afraid of cats. Alice is a mouse. Hugo is a "
                "cat.",
                "What is alice afraid of?",
                "cat",
            ),
            Example(
                "Wolves are afraid of sheep. Clara is a wolf. Sheep are afraid of mice. Oscar is a "
                "sheep.",
                "What is clara afraid of?",
                "sheep",
            ),
        ),
        ANIMAL,
    ),
    "qa16": Prompt(
        HIDDEN + "The facts say of what kind and of what color animals are. An animal whose color "
        "is not told has that of another one of its kind.",
        (
            Example(
                "Alice is a swan. Hugo is a lion. Hugo is yellow. Oscar is a swan. Oscar is white.",
                "What color is Alice?",
                "white",
            ),
            Example(
                "Clara is a frog. Felix is a rhino. Emma is green. Emma is a frog. Felix is gray.",
                "What color is Clara?",
                "green",
            ),
        ),
        COLOR,
    ),
    "qa17": Prompt(
        HIDDEN + "The facts say which shape is above, below, to the left or to the right of which.",
        (
            Example(
                "The blue circle is above the gray star. The green cone is to the left of the blue "
                "circle.",
                "Is the green cone above the gray star?",
                "yes",
            ),
            Example(
                "The gray star is below the green cone. The gray star is to the right of the blue "
                "circle.",
                "Is the green cone to the left of the blue circle?",
                "no",
            ),
        ),
        YES_NO,
    ),
    "qa18": Prompt(
        HIDDEN + "The facts say which thing is bigger than which, or fits inside it. What fits "
        "inside a thing fits inside all bigger things, too.",
        (
            Example(
                "The bottle fits inside the bucket. The bucket fits inside the barrel.",
                "Does the bottle fit in the barrel?",
                "yes",
            ),
            Example(
                "The wagon is bigger than the barrel. The barrel is bigger than the bucket.",
                "Is the bucket bigger than the wagon?",
                "no",
            ),
        ),
        YES_NO,
    ),
    "qa19": Prompt(
        HIDDEN + "The facts say in which direction one place lies from another. Tell the two steps "
        "of the way, such as north and then east.",
        (
            Example(
                "The cellar is north of the garage. The library is east of the cellar.",
                "How do you go from the garage to the library?",
                "n,e",
            ),
            Example(
                "The pantry is south of the attic. The attic is west of the museum.",
                "How do you go from the museum to the pantry?",
                "w,s",
            ),
        ),
        STEPS,
    ),
    "qa20": Prompt(
        HIDDEN + "The facts say how people feel, where they go and what they take. The feeling is "
        "the reason why a person goes to a place.",
        (
            Example(
                "Alice is tired. Hugo is hungry.",
                "Where will alice go?",
                "bedroom",
            ),
            Example(
                "Oscar is thirsty. Clara is bored. Oscar went to the kitchen.",
                "Why did oscar go to the kitchen?",
                "thirsty",
            ),
        ),
        FEELING,
    ),
}


def head_text(task: str) -> str:
    """The text before the context: instruction, examples and the form of an answer."""
    prompt = PROMPTS[task]
    examples = [EXAMPLE.format(**example._asdict()) for example in prompt.examples]
    return HEAD.format(
        instruction=prompt.instruction, examples="\n".join(examples), form=prompt.form
    )


def with_template(document: Document, task: str, tokenizer: Tokenizer) -> Document:
    """The same document as the benchmark asks it: the head of its task, the context, the question
    in the template's words, the answer.

    The ids of the context and of the answer stay. `questions` keeps the question without the
    template, because retrieval and the benchmark's metric need it."""
    head = tokenizer.encode(head_text(task))
    if tokenizer.bos is not None:
        head.insert(0, tokenizer.bos)
    context = document.ids[document.cuts[0] : document.context_len]
    question = tokenizer.encode(TAIL.format(question=document.questions[0].text))
    start, stop = document.answers[0]
    answer = document.ids[start:stop]
    shift = len(head) - document.cuts[0]
    cuts = [cut + shift for cut in document.cuts]
    answer_start = cuts[-1] + len(question)
    return document._replace(
        ids=np.concatenate([head, context, question, answer], dtype=np.int64),
        answers=[(answer_start, answer_start + len(answer))],
        cuts=cuts,
    )

"use strict";
/* Where script.js gets its answers in the page that demo.py serves: from the server. */

const reader = {
  note: "Pictures are not stored.",

  /** What the page says of the model. */
  describe: () => answerTo("model"),

  /**
   * What is in a drawing, side x side bytes, black on white. It is sent as a PGM file, since toBlob writes a
   * PNG file when the browser is idle, and that may be a second later.
   */
  readDrawing: (grey, side) =>
    answerTo("predict?drawing", { method: "POST", body: new Blob([`P5 ${side} ${side} 255\n`, grey]) }),

  /** What is in a picture's file. */
  readPicture: (file) => answerTo("predict", { method: "POST", body: file }),
};

async function answerTo(path, request) {
  try {
    return await (await fetch(path, request)).json();
  } catch {
    return { error: "No answer came. Is demo.py still running?" };
  }
}

// Browsers start no worker from a file. On file:// pages, the search's worker runs in a hidden frame
// instead; on a server, nothing changes.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = frame.contentWindow;
      this.inner = inner;
      const load = (address) =>
        new Promise((resolve) => {
          const script = inner.document.createElement("script");
          script.src = new URL(address, document.baseURI);
          script.onload = resolve;
          inner.document.body.append(script);
        });
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inner.importScripts = (...addresses) =>
        addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
      this.ready = load(url);
    }
    postMessage(data) {
      this.ready.then(() =>
        this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data })),
      );
    }
    terminate() {
      this.inner.frameElement.remove();
    }
  };
}

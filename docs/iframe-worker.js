// A browser starts no worker from a page that was opened as a file, so there the search runs in a
// hidden frame instead: the same script, the same messages.
if (location.protocol === 'file:') {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement('iframe');
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      const base = new URL(address, location.href);
      const load = (source) =>
        new Promise((resolve, reject) => {
          const script = inside.document.createElement('script');
          Object.assign(script, { src: new URL(source, base).href, onload: resolve, onerror: reject });
          inside.document.head.append(script);
        });
      inside.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent('message', { data }));
      this.inside = inside;
      this.ready = load(base);
    }

    postMessage(data) {
      const { inside } = this;
      this.ready.then(() => inside.dispatchEvent(new inside.MessageEvent('message', { data })));
    }

    terminate() {
      this.inside.frameElement.remove();
    }
  };
}

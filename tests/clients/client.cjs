// A client of the contract by @grpc/grpc-js: what each case sees is asserted here, what it was
// answered is printed as JSON.
//
// Usage: NODE_PATH=.../node_modules node client.cjs PROTOS HOST:PORT CASE [ROWS as JSON]
"use strict";

const assert = require("node:assert");
const grpc = require("@grpc/grpc-js");
const { loadSync } = require("@grpc/proto-loader");

const [protos, address, name, rows] = process.argv.slice(2);
const options = { keepCase: true, longs: Number, includeDirs: [protos] };
const contract = grpc.loadPackageDefinition(
    loadSync("stepstate/v1/stepstate.proto", options),
).stepstate.v1;
const client = new contract.StepstateService(address, grpc.credentials.createInsecure());
const session_id = `js-${process.pid}`;
const status = grpc.status;

/** A unary call; resolves to its response or error, and its initial metadata. */
function unary(method, request, { metadata = new grpc.Metadata(), ...settings } = {}) {
    return new Promise((resolve) => {
        const seen = {};
        const call = client[method](request, metadata, settings, (error, response) =>
            resolve({ error, response, ...seen }),
        );
        call.on("metadata", (initial) => Object.assign(seen, { initial }));
        if (settings.cancelled) call.cancel();
    });
}

async function served(method, request, settings) {
    const { error, response } = await unary(method, request, settings);
    assert.ifError(error);
    return response;
}

/** The messages of a stream, and the code that it ended with. */
function collect(stream) {
    return new Promise((resolve) => {
        const messages = [];
        stream.on("data", (message) => messages.push(message));
        stream.on("error", () => {});
        stream.on("status", ({ code }) => resolve({ messages, code }));
    });
}

const open = (model = "lstm") => served("OpenSession", { session_id, model });
const soon = (milliseconds) => ({ deadline: Date.now() + milliseconds });
const slow = () => ({ session_id, t: 0, x: Array(3 * 1500).fill(0.5), inspect: true, last_only: true });

const cases = {
    async unary() {
        await open();
        const y = [];
        for (const [t, x] of JSON.parse(rows).entries())
            y.push(...(await served("Step", { session_id, t, x })).y);
        return y;
    },

    async stream() {
        await open();
        const stream = client.StreamSteps();
        const collected = collect(stream);
        for (const [t, x] of JSON.parse(rows).entries()) stream.write({ session_id, t, x });
        stream.end();
        const { messages, code } = await collected;
        assert.strictEqual(code, status.OK);
        assert.ok(messages.every((message, place) => message.t === place + 1));
        return messages.flatMap((message) => message.y);
    },

    async errors() {
        const { error } = await unary("Step", { session_id: "nobody", t: 0, x: [1, 2, 3] });
        assert.strictEqual(error.code, status.NOT_FOUND);
        assert.match(error.details, /nobody/);
        const [details] = error.metadata.get("grpc-status-details-bin");
        assert.ok(Buffer.isBuffer(details) && details.includes("SESSION_UNKNOWN"));
    },

    async cancel() {
        await open();
        const early = await unary("Step", slow(), { cancelled: true });
        assert.strictEqual(early.error.code, status.CANCELLED);
        const stream = client.StreamSteps();
        const collected = collect(stream);
        stream.once("data", () => stream.cancel());
        stream.write({ session_id, x: [1, 2, 3] });
        const { messages, code } = await collected;
        assert.strictEqual(code, status.CANCELLED);
        assert.strictEqual(messages.length, 1);
        assert.ok((await served("ListModels", {})).models.length);
    },

    async deadline() {
        await open();
        const late = await unary("Step", slow(), soon(100));
        assert.strictEqual(late.error.code, status.DEADLINE_EXCEEDED);
        const { code } = await collect(client.StreamSteps(new grpc.Metadata(), soon(100)));
        assert.strictEqual(code, status.DEADLINE_EXCEEDED);
        assert.ok((await served("ListModels", {}, soon(30_000))).models.length);
    },

    async metadata() {
        const metadata = new grpc.Metadata();
        metadata.add("x-text", "a value");
        metadata.add("x-text", "another");
        metadata.add("x-data-bin", Buffer.from([0, 255, 1]));
        const { error, initial } = await unary("ListModels", {}, { metadata });
        assert.ifError(error);
        assert.deepStrictEqual(Object.keys(initial.getMap()), ["content-type"]);
        metadata.add("x-long", "x".repeat(20_000));
        const refused = await unary("ListModels", {}, { metadata });
        assert.strictEqual(refused.error.code, status.RESOURCE_EXHAUSTED);
        assert.ok((await served("ListModels", {})).models.length);
    },

    async snapshot() {
        await open("far");
        await served("Step", { session_id, t: 0, x: Array(50).fill(0.25) });
        const { messages, code } = await collect(client.StreamExport({ session_id }));
        assert.strictEqual(code, status.OK);
        const size = messages.reduce((sum, { data }) => sum + data.length, 0);
        assert.strictEqual(size, messages[0].size);
        assert.ok(size > 4_000_000);
        const imported = await new Promise((resolve, reject) => {
            const call = client.StreamImport((error, response) =>
                error ? reject(error) : resolve(response),
            );
            call.write({ size, session_id: `${session_id}-copy` });
            for (const { data } of messages) call.write({ data });
            call.end();
        });
        assert.strictEqual(imported.session.t, 1);
    },

    async compressed() {
        const packing = new contract.StepstateService(address, grpc.credentials.createInsecure(), {
            "grpc.default_compression_algorithm": 2, // gzip
        });
        const { code, details } = await new Promise((resolve) =>
            packing.ListModels({}, (error) => resolve(error ?? { code: status.OK })),
        );
        packing.close();
        return { code, details };
    },
};

cases[name]().then((answer) => {
    console.log(JSON.stringify(answer ?? null));
    client.close();
});
